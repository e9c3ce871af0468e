/* The timeline: a canvas that can be moved and zoomed by mouse, finger and keyboard. */
(function () {
  const canvas = document.getElementById("timeline");
  if (!canvas) return;
  const overview = document.getElementById("overview");
  const tip = document.getElementById("tip");
  const live = document.getElementById("live");
  const lanes = data.lanes;
  const names = data.names;
  const NAME = 0, START = 1, LENGTH = 2, BYTES = 3;
  const TALL = { compute: 40, "micro-batches": 16 };
  const COLOURS = { compute: "compute", "micro-batches": "compute", wait: "wait", ranks: "wait", disk: "disk", staging: "disk", cast: "cast", activations: "cast" };
  const AXIS = 22, TITLE = 17, BAR = 24, GAP = 7;
  let first = Infinity, last = -Infinity, longest = 0;
  for (const lane of lanes) {
    lane.longest = 0;
    for (const s of lane.spans) {
      first = Math.min(first, s[START]);
      last = Math.max(last, s[START] + s[LENGTH]);
      lane.longest = Math.max(lane.longest, s[LENGTH]);
    }
    longest = Math.max(longest, lane.longest);
  }
  if (!(last > first)) last = first + 1;
  const computing = lanes.find((lane) => lane.kind === "compute");
  const passes = computing ? computing.spans.filter((s) => s[NAME] === computing.spans[0][NAME]).map((s) => s[START]) : [];
  let view = [first, last], hovered = null, pixels = 1, width = 0;
  let height = AXIS;
  for (const lane of lanes) {
    lane.top = height + TITLE;
    lane.height = TALL[lane.kind] || BAR;
    height = lane.top + lane.height + GAP;
  }

  function fit(element, tall) {
    pixels = window.devicePixelRatio || 1;
    width = element.clientWidth;
    element.style.height = tall + "px";
    element.width = Math.round(width * pixels);
    element.height = Math.round(tall * pixels);
    const pen = element.getContext("2d");
    pen.setTransform(pixels, 0, 0, pixels, 0, 0);
    pen.clearRect(0, 0, width, tall);
    return pen;
  }

  const x = (t) => ((t - view[0]) / (view[1] - view[0])) * width;
  const t = (px) => view[0] + (px / width) * (view[1] - view[0]);

  /* The first span that may reach into `from`: they are sorted by their ends. */
  function from(lane, at) {
    let low = 0, high = lane.spans.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (lane.spans[middle][START] + lane.spans[middle][LENGTH] < at) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  function inView(lane, act) {
    for (let i = from(lane, view[0]); i < lane.spans.length; i++) {
      if (lane.spans[i][START] > view[1]) break;
      act(lane.spans[i], i);
    }
  }

  const short = (name) => name.split(".").pop();

  function draw() {
    const pen = fit(canvas, height);
    const ink = colour("ink"), soft = colour("soft"), line = colour("line"), ground = colour("ground");
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    axis(pen, soft, line);
    for (const lane of lanes) {
      const main = colour(COLOURS[lane.kind] || "host");
      const other = COLOURS[lane.kind] === "wait" ? main : colour((COLOURS[lane.kind] || "host") + "-2");
      pen.fillStyle = ground;
      pen.fillRect(0, lane.top, width, lane.height);
      let busy = 0, moved = 0, end = -1;
      inView(lane, (s, i) => {
        const a = Math.max(s[START], view[0]), b = Math.min(s[START] + s[LENGTH], view[1]);
        busy += Math.max(0, b - a);
        if (s[LENGTH] > 0) moved += s[BYTES] * Math.max(0, b - a) / s[LENGTH];
        const left = x(a), right = Math.max(x(b), left + .5);
        if (right <= end) return;
        const isLit = hovered !== null && lane.kind !== "micro-batches" && s[NAME] === hovered;
        pen.globalAlpha = hovered === null || isLit || lane.kind === "micro-batches" ? 1 : .38;
        pen.fillStyle = i % 2 ? other : main;
        const gap = right - left > 4 ? 1 : 0;
        pen.fillRect(left, lane.top, right - left - gap, lane.height);
        pen.globalAlpha = 1;
        if (isLit) { pen.strokeStyle = ink; pen.lineWidth = 1.5; pen.strokeRect(left + .75, lane.top + .75, Math.max(1, right - left - gap - 1.5), lane.height - 1.5); }
        label(pen, lane, s, left, right, main !== other && i % 2 ? "on-2" : "card");
        end = right;
      });
      title(pen, lane, busy, moved, ink, soft);
    }
    miniature();
    live.textContent = "Shown: " + duration(view[1] - view[0]) + " of " + duration(last - first) + " recorded" + (passes.length ? ", " + shownPasses() : "") + ".";
  }

  function shownPasses() {
    const n = (view[1] - view[0]) / ((last - first) / passes.length);
    return n > .85 && n < 1.15 ? "about one pass" : "about " + (n < 10 ? n.toFixed(n < .95 ? 2 : 1) : count(n)) + " passes";
  }

  function label(pen, lane, s, left, right, ink) {
    if (right - left < 22 || lane.height < 14) return;
    const text = short(names[s[NAME]]);
    if (pen.measureText(text).width > right - left - 6) return;
    pen.fillStyle = colour(ink);
    pen.textAlign = "center";
    pen.fillText(text, (left + right) / 2, lane.top + lane.height / 2 + .5);
  }

  function title(pen, lane, busy, moved, ink, soft) {
    const share = busy / (view[1] - view[0]);
    pen.textAlign = "left";
    pen.fillStyle = ink;
    pen.font = "600 11px system-ui, sans-serif";
    pen.fillText(lane.name, 4, lane.top - 8);
    const w = pen.measureText(lane.name).width + 4;
    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = soft;
    const speed = moved && busy ? ", " + rate(moved / busy) + " while busy" : "";
    pen.fillText((share * 100).toFixed(share < .0995 ? 1 : 0) + " %" + speed, w + 7, lane.top - 8);
  }

  function axis(pen, soft, line) {
    pen.textAlign = "center";
    pen.strokeStyle = line;
    pen.lineWidth = 1;
    const marks = ticks(view[0], view[1], width / 90), step = marks.length > 1 ? marks[1] - marks[0] : 1e6;
    for (const at of marks) {
      const px = x(at);
      pen.fillStyle = soft;
      if (px > 20 && px < width - 20) pen.fillText(instant(at, step), px, 8);
      pen.beginPath(); pen.moveTo(px, 16); pen.lineTo(px, height); pen.stroke();
    }
    pen.strokeStyle = soft;
    pen.setLineDash([3, 3]);
    if (passes.length < width / 12 * (last - first) / (view[1] - view[0])) {
      for (const at of passes) {
        if (at < view[0] || at > view[1]) continue;
        pen.beginPath(); pen.moveTo(x(at), 14); pen.lineTo(x(at), height); pen.stroke();
      }
    }
    pen.setLineDash([]);
  }

  function miniature() {
    const tall = 26, pen = fit(overview, tall);
    pen.fillStyle = colour("ground");
    pen.fillRect(0, 0, width, tall);
    const scale = width / (last - first);
    ["compute", "wait", "disk"].forEach((name, row) => {
      const lane = lanes.find((l) => l.name === name);
      if (!lane) return;
      pen.fillStyle = colour(name);
      let end = -1;
      for (const s of lane.spans) {
        const left = (s[START] - first) * scale, right = Math.max((s[START] + s[LENGTH] - first) * scale, left + .5);
        if (right <= end) continue;
        pen.fillRect(left, 4 + row * 6.5, right - left, 5);
        end = right;
      }
    });
    const left = (view[0] - first) * scale, right = Math.max((view[1] - first) * scale, left + 3);
    pen.globalAlpha = .55;
    pen.fillStyle = colour("card");
    pen.fillRect(0, 0, left, tall);
    pen.fillRect(right, 0, width - right, tall);
    pen.globalAlpha = 1;
    pen.strokeStyle = colour("ink");
    pen.lineWidth = 1.5;
    pen.strokeRect(left + .75, .75, Math.max(2, right - left - 1.5), tall - 1.5);
  }

  let isAsked = false;
  function redraw() {
    if (isAsked) return;
    isAsked = true;
    requestAnimationFrame(() => { isAsked = false; draw(); });
  }

  function show(low, high) {
    const least = Math.min(20, last - first), length = Math.min(Math.max(high - low, least), last - first);
    const start = Math.min(Math.max(low, first), last - length);
    view = [start, start + length];
    redraw();
  }
  const zoom = (factor, at) => show(at - (at - view[0]) * factor, at + (view[1] - at) * factor);
  const move = (share) => { const by = (view[1] - view[0]) * share; show(view[0] + by, view[1] + by); };
  function onePass() {
    if (passes.length < 2) return show(first, last);
    const length = (last - passes[0]) / passes.length;
    const at = Math.max(0, passes.length - 2);
    show(passes[at], (passes[at + 1] || passes[at] + length));
  }
  const middle = () => (view[0] + view[1]) / 2;
  const acts = {
    in: () => zoom(.5, middle()), out: () => zoom(2, middle()), all: () => show(first, last),
    left: () => move(-.25), right: () => move(.25), pass: onePass,
  };
  for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", acts[button.dataset.do]);
  canvas.addEventListener("keydown", (event) => {
    const act = { ArrowLeft: "left", ArrowRight: "right", "+": "in", "=": "in", "-": "out", Home: "all" }[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    acts[act]();
  });
  canvas.addEventListener("wheel", (event) => {
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey) {
      event.preventDefault();
      const by = ((event.deltaX || event.deltaY) / width) * (view[1] - view[0]);
      show(view[0] + by, view[1] + by);
    } else if (event.ctrlKey || event.metaKey || document.activeElement === canvas) {
      event.preventDefault();  /* else the page scrolls past */
      zoom(Math.exp(event.deltaY * .002), t(event.offsetX));
    }
  }, { passive: false });
  canvas.addEventListener("dblclick", (event) => zoom(.4, t(event.offsetX)));

  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, event.offsetX);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (fingers.has(event.pointerId)) drag(event);
    point(event);
  });
  function drag(event) {
    const before = [...fingers.values()];
    fingers.set(event.pointerId, event.offsetX);
    const after = [...fingers.values()];
    if (before.length === 1) {
      const by = ((before[0] - after[0]) / width) * (view[1] - view[0]);
      show(view[0] + by, view[1] + by);
    } else if (Math.abs(after[0] - after[1]) > 8) {
      zoom(Math.abs(before[0] - before[1]) / Math.abs(after[0] - after[1]), t((after[0] + after[1]) / 2));
    }
  }
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; if (hovered !== null) { hovered = null; redraw(); } });

  function under(px, py) {
    const lane = lanes.find((l) => py >= l.top && py <= l.top + l.height);
    if (!lane) return null;
    const low = t(px - 2), high = t(px + 2);
    for (let i = from(lane, low); i < lane.spans.length && lane.spans[i][START] <= high; i++) return [lane, lane.spans[i]];
    return null;
  }

  function point(event) {
    const found = under(event.offsetX, event.offsetY);
    const name = found && found[0].name !== "micro-batches" ? found[1][NAME] : null;
    if (name !== hovered) { hovered = name; redraw(); }
    if (!found) { tip.hidden = true; return; }
    const [lane, s] = found;
    const what = lane.kind === "micro-batches" ? "micro-batch " + names[s[NAME]] : names[s[NAME]];
    const moved = s[BYTES] ? "\n" + bytes(s[BYTES]) + (s[LENGTH] ? ", " + rate(s[BYTES] / s[LENGTH]) : "") : "";
    tip.textContent = what + "\n" + lane.name + ": " + duration(s[LENGTH]) + ", from " + duration(s[START]) + moved;
    tip.style.whiteSpace = "pre-line";
    tip.hidden = false;
    tip.style.left = Math.max(0, Math.min(event.offsetX + 12, width - tip.offsetWidth)) + "px";
    tip.style.top = lane.top + lane.height + 6 + "px";
  }

  overview.addEventListener("pointerdown", (event) => {
    overview.setPointerCapture(event.pointerId);
    jump(event);
  });
  overview.addEventListener("pointermove", (event) => { if (event.buttons) jump(event); });
  function jump(event) {
    const at = first + (event.offsetX / overview.clientWidth) * (last - first), half = (view[1] - view[0]) / 2;
    show(at - half, at + half);
  }

  new ResizeObserver(redraw).observe(canvas.parentElement);
  onTheme(redraw);
  draw();
  onePass();
})();
