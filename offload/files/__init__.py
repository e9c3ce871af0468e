"""Files of rows, and files of results.

`find_files` (sources) lists the input files, and `Inputs` (inputs) reads their rows:
lines of JSON or text (json_rows), a JSON array (json_array), CSV (csv_rows), or columns
(columns); `decompressed` (compression) is below them. `read_parts` (part_reader) cuts
the rows into parts (parts). `encoded` (outputs, csv_results) writes results as one
file, in durable steps (durable); `StreamedOutput` (streamed_output) writes them to a
pipe. `json_rows` knows the keys of a row, too. `fingerprint` tells files apart, and
`extras` imports optional packages.
"""
