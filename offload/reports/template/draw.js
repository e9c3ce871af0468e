"use strict";
/* What both pictures need: the data, words for numbers, and the colours of the theme. */
const data = JSON.parse(document.getElementById("data").textContent);

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(n) < 1024) return (unit === "B" ? n.toFixed(0) : n.toFixed(1)) + " " + unit;
    n /= 1024;
  }
  return n.toFixed(1) + " TiB";
}

/* Of bytes in a microsecond. */
function rate(bytes) {
  return bytes >= 100 ? (bytes / 1e3).toFixed(2) + " GB/s" : bytes.toFixed(1) + " MB/s";
}

function duration(micros) {
  const size = Math.abs(micros);
  if (size < 1e3) return micros.toFixed(0) + " µs";
  if (size < 1e6) return (micros / 1e3).toFixed(size < 1e4 ? 2 : 1) + " ms";
  if (size < 6e7) return (micros / 1e6).toFixed(size < 1e7 ? 2 : 1) + " s";
  return clock(micros / 1e6);
}

/* A time on an axis whose marks are `step` apart. */
function instant(micros, step) {
  const digits = Math.max(0, -Math.floor(Math.log10(step / 1e6) + 1e-9));
  return micros >= 6e7 && digits === 0 ? clock(micros / 1e6) : (micros / 1e6).toFixed(digits) + " s";
}

function clock(seconds) {
  const whole = Math.round(seconds);
  const two = (n) => String(n).padStart(2, "0");
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return minutes + ":" + two(whole % 60);
  return Math.floor(minutes / 60) + ":" + two(minutes % 60) + ":" + two(whole % 60);
}

function count(n) {
  if (n >= 1e6) return +(n / 1e6).toPrecision(3) + "M";
  if (n >= 1e4) return +(n / 1e3).toPrecision(3) + "k";
  return n >= 100 ? n.toFixed(0) : String(+n.toPrecision(3));
}

/* Round steps of 1, 2 and 5 within [low, high], about `wanted` of them. */
function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(at);
  return found;
}

function onTheme(redraw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}
