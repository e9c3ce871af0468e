/* The small pictures: memory, throughput and the roofline, as SVG. */
(function () {
  const SVG = "http://www.w3.org/2000/svg";
  const LEFT = 52, RIGHT = 10, TOP = 14, BOTTOM = 24;

  function node(parent, kind, attributes, text) {
    const made = document.createElementNS(SVG, kind);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.appendChild(made);
    return made;
  }

  function frame(element) {
    element.replaceChildren();
    const width = element.clientWidth, height = element.clientHeight;
    const svg = node(element, "svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    return { svg, width, height, right: width - RIGHT, bottom: height - BOTTOM };
  }

  function axes(f, x, y, xTicks, yTicks, xText, yText) {
    for (const at of yTicks) {
      node(f.svg, "line", { class: "grid", x1: LEFT, x2: f.right, y1: y(at), y2: y(at) });
      node(f.svg, "text", { x: LEFT - 6, y: y(at) + 4, "text-anchor": "end" }, yText(at));
    }
    for (const at of xTicks) node(f.svg, "text", { x: x(at), y: f.height - 6, "text-anchor": x(at) > f.right - 20 ? "end" : "middle" }, xText(at));
  }

  const path = (points) => "M" + points.map((p) => p[0].toFixed(1) + " " + p[1].toFixed(1)).join("L");

  /* Lines over time: [{points: [[seconds, value]], line, under}], from 0 up. */
  function overTime(element, lines, levels, text, describe) {
    const f = frame(element);
    const all = lines.flatMap((line) => line.points);
    if (!all.length) { node(f.svg, "text", { x: f.width / 2, y: f.height / 2, "text-anchor": "middle" }, "too short to say"); return; }
    const low = Math.min(...all.map((p) => p[0])), high = Math.max(...all.map((p) => p[0]), low + 1e-3);
    const top = 1.12 * Math.max(...all.map((p) => p[1]), ...levels.map((l) => l.value));
    const x = (v) => LEFT + ((v - low) / (high - low)) * (f.right - LEFT);
    const y = (v) => f.bottom - (v / top) * (f.bottom - TOP);
    axes(f, x, y, ticks(low, high, Math.min(6, f.width / 90)), text.ticks(top), (v) => high < 120 ? count(v) + " s" : clock(v), text.value);
    for (const line of lines) {
      if (!line.points.length) continue;
      const drawn = line.points.map((p) => [x(p[0]), y(p[1])]);
      if (line.under) node(f.svg, "path", { class: line.under, d: path([[drawn[0][0], f.bottom], ...drawn, [drawn[drawn.length - 1][0], f.bottom]]) + "Z" });
      node(f.svg, "path", { class: line.line, d: path(drawn) });
    }
    for (const level of levels) {
      node(f.svg, "line", { class: "budget", x1: LEFT, x2: f.right, y1: y(level.value), y2: y(level.value) });
      node(f.svg, "text", { class: "name", x: f.right, y: y(level.value) - 5, "text-anchor": "end" }, level.name);
    }
    const cross = node(f.svg, "line", { class: "cross", y1: TOP, y2: f.bottom, visibility: "hidden" });
    const said = node(f.svg, "text", { class: "name", x: LEFT + 4, y: TOP - 3 }, "");
    f.svg.addEventListener("pointermove", (event) => {
      const box = f.svg.getBoundingClientRect();
      const at = low + ((event.clientX - box.left - LEFT) / (f.right - LEFT)) * (high - low);
      if (at < low || at > high) return;
      cross.setAttribute("x1", x(at));
      cross.setAttribute("x2", x(at));
      cross.setAttribute("visibility", "visible");
      said.textContent = describe(at);
    });
    f.svg.addEventListener("pointerleave", () => { cross.setAttribute("visibility", "hidden"); said.textContent = ""; });
  }

  function nearest(rows, at) {
    let best = rows[0];
    for (const row of rows) if (Math.abs(row[0] - at) < Math.abs(best[0] - at)) best = row;
    return best;
  }

  function memory(element) {
    const rows = data.memory, onDevice = rows.filter((r) => r[2] !== null);
    overTime(
      element,
      [
        { points: rows.map((r) => [r[0], r[1]]), line: "memory", under: "under" },
        { points: onDevice.map((r) => [r[0], r[2]]), line: "device" },
      ],
      [{ value: data.working_set_bytes, name: "working set" }],
      { ticks: (top) => { const unit = 1024 ** Math.floor(Math.log2(top) / 10); return ticks(0, top / unit, 4).map((v) => v * unit); }, value: (v) => v ? bytes(v) : "0" },
      (at) => { const r = nearest(rows, at); return `${count(r[0])} s: ${bytes(r[1])}` + (r[2] === null ? "" : `, on the device ${bytes(r[2])}`); },
    );
  }

  function throughput(element) {
    const steps = data.speeds;
    const points = steps.flatMap((s) => [[s[0], s[2]], [s[1], s[2]]]);
    const mean = [{ value: data.mean_speed, name: `mean ${count(data.mean_speed)}` }];
    overTime(
      element, [{ points, line: "speed", under: "under-speed" }], mean,
      { ticks: (top) => ticks(0, top, 4), value: count },
      (at) => { const s = steps.find((s) => at <= s[1]) || steps[steps.length - 1]; return `${count(s[0])} to ${count(s[1])} s: ${count(s[2])} tokens/s`; },
    );
  }

  function roofline(element) {
    const roof = data.roofline;
    if (!roof || !element) return;
    const f = frame(element);
    const ridge = roof.passes_per_second ? roof.compute_tokens_per_second / roof.passes_per_second : null;
    const dot = [roof.tokens_per_pass, roof.tokens_per_second];
    const low = Math.log10(Math.min(dot[0], ridge || dot[0]) / 8), high = Math.log10(Math.max(dot[0], ridge || dot[0]) * 8);
    const floor = Math.log10(Math.min(dot[1], roof.passes_per_second ? 10 ** low * roof.passes_per_second : dot[1]) / 1.6);
    const top = Math.log10(roof.compute_tokens_per_second * 2.4);
    const x = (v) => LEFT + ((Math.log10(v) - low) / (high - low)) * (f.right - LEFT);
    const y = (v) => f.bottom - ((Math.log10(v) - floor) / (top - floor)) * (f.bottom - TOP);
    axes(f, x, y, powers(low, high), powers(floor, top), count, count);
    node(f.svg, "text", { x: f.right, y: f.bottom - 5, "text-anchor": "end" }, "tokens in a pass");
    node(f.svg, "text", { x: LEFT + 4, y: TOP - 3 }, "tokens/s");
    const flat = roof.compute_tokens_per_second;
    const points = ridge ? [[10 ** low, 10 ** low * roof.passes_per_second], [ridge, flat], [10 ** high, flat]] : [[10 ** low, flat], [10 ** high, flat]];
    if (ridge) {
      node(f.svg, "line", { class: "ridge", x1: x(ridge), x2: x(ridge), y1: y(flat), y2: f.bottom });
      node(f.svg, "text", { x: x(ridge), y: f.bottom - 18, "text-anchor": "middle" }, count(ridge));
    }
    node(f.svg, "path", { class: "roof", d: path(points.map((p) => [x(p[0]), y(p[1])])) });
    node(f.svg, "text", { class: "name", x: f.right, y: y(flat) - 7, "text-anchor": "end" }, `computing: ${count(flat)}`);
    node(f.svg, "circle", { class: "dot", cx: x(dot[0]), cy: y(dot[1]), r: 7 });
    const isRight = x(dot[0]) > f.width * .6;
    node(f.svg, "text", { class: "name", x: x(dot[0]) + (isRight ? -12 : 12), y: y(dot[1]) + 18, "text-anchor": isRight ? "end" : "start" }, `this run: ${count(dot[1])}`);
  }

  function powers(low, high) {
    const found = [];
    for (let power = Math.floor(low); power <= high; power++) {
      for (const m of high - low > 2.2 ? [1] : [1, 2, 5]) {
        const log = power + Math.log10(m);
        if (log >= low && log <= high) found.push(m * 10 ** power);
      }
    }
    return found;
  }

  const charts = { memory, throughput, roofline };
  function draw() {
    for (const [id, make] of Object.entries(charts)) {
      const element = document.getElementById(id);
      if (element) make(element);
    }
  }
  new ResizeObserver(draw).observe(document.body);
  draw();
})();
