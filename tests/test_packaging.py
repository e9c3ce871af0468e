"""What is installed: all folders of code, and every file that they read."""

from configparser import ConfigParser
from pathlib import Path

import penstock

ROOT = Path(penstock.__file__).parent
FLOORS = ("io", "offload", "scheduler")


def setup() -> ConfigParser:
    read = ConfigParser()
    read.read(ROOT / "setup.cfg", encoding="utf-8")
    return read


def package_of(folder: Path) -> str:
    return ".".join(["penstock", *folder.relative_to(ROOT).parts])


def folder_of(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def files() -> list[Path]:
    return [
        path
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]


def test_every_folder_of_code_is_a_package_that_is_installed() -> None:
    folders = {path.parent for path in files() if path.suffix == ".py"}
    packages = setup()["options"]["packages"].split()
    assert packages == sorted({"penstock", *map(package_of, folders)})


def test_every_folder_of_code_but_io_is_a_regular_package() -> None:
    folders = {path.parent for path in files() if path.suffix == ".py"}
    lack = {folder for folder in folders if not (folder / "__init__.py").exists()}
    assert lack == {ROOT / "io"}


def test_every_file_that_is_no_code_is_installed() -> None:
    installed = {
        path
        for package, patterns in setup()["options.package_data"].items()
        for pattern in patterns.split()
        for path in folder_of(package).glob(pattern)
    }
    assert {path for path in files() if path.suffix != ".py"} <= installed


def test_every_pattern_of_data_finds_something() -> None:
    for package, patterns in setup()["options.package_data"].items():
        for pattern in patterns.split():
            assert list(folder_of(package).glob(pattern)), f"{package}: {pattern}"


def test_the_root_ships_no_code_but_the_package_and_its_command() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}
