
// ---- a chart: lines with a band, or stacked bars, over steps

const COLOURS = 6;
/** One chart, or as many as it takes for each series to have a colour of its own. */
function split(spec) {
  const count = Math.ceil(spec.series.length / COLOURS);
  return Array.from({ length: count }, (_, i) => ({ ...spec, title: count > 1 ? `${spec.title}, ${i + 1} of ${count}` : spec.title,
    series: spec.series.slice(i * COLOURS, (i + 1) * COLOURS) }));
}

/** At most `limit` [step, values] lines: neighbours are averaged, so that long runs stay readable. */
function condense(lines, keys, limit) {
  const width = Math.ceil(lines.length / limit);
  if (width <= 1) return lines;
  const condensed = [];
  for (let start = 0; start < lines.length; start += width) {
    const part = lines.slice(start, start + width);
    const means = {};
    for (const key of keys) {
      const known = part.map(([, values]) => values[key]).filter(Number.isFinite);
      means[key] = known.length ? known.reduce((a, b) => a + b) / known.length : null;
    }
    condensed.push([part[part.length - 1][0], means]);
  }
  return condensed;
}

function addChart(spec) {
  const all = spec.metrics[spec.phase];
  // [metric name, label, colour]: a series keeps its colour when another one is missing
  const series = spec.series.map(([key, label], index) => [key, label, `s${index}`])
    .filter(([key], index) => all.some(([, values]) => (spec.some || (spec.parts && index) ? values[key] > 0 : Number.isFinite(values[key]))));
  if (!series.length) return;
  const keys = [...series.map(([key]) => key), ...(spec.band ? [spec.band] : [])];
  const known = all.filter(([, values]) => series.some(([key]) => Number.isFinite(values[key])));
  const lines = condense(known, keys, spec.stack ? 120 : 400);
  const merged = Math.ceil(known.length / lines.length);
  const format = spec.share ? show.percent : spec.format || show.number;
  const last = (key) => known.map(([, values]) => values[key]).filter(Number.isFinite).at(-1);

  const plot = el("div", { className: "plot" });
  const tip = el("div", { className: "tip", hidden: true });
  const note = [spec.note, merged > 1 ? `Each ${spec.stack ? "bar" : "point"} is the mean of ${merged} steps.` : ""].filter(Boolean);
  const legend = el("ul", { className: "legend" }, series.map(([key, label, colour]) =>
    el("li", { className: colour }, el("i"), `${label} `, el("b", {}, format(last(key))))));
  const card = el("figure", { className: spec.wide ? "chart wide" : "chart" },
    el("figcaption", {}, el("h3", {}, spec.title), el("p", {}, note.join(" "))), legend, plot, tip);
  byId(spec.place || (spec.more ? "more-charts" : "charts")).append(card);

  const spoken = series.map(([key, label]) => {
    const values = known.map(([step, line]) => [step, line[key]]).filter(([, value]) => Number.isFinite(value));
    const [from, to] = [values[0], values.at(-1)];
    return `${label}: ${format(from[1])} at step ${from[0]}, ${format(to[1])} at step ${to[0]}`;
  });
  const draw = () => drawPlot({ spec, series, lines, format, plot, tip, label: `${spec.title}. ${spoken.join("; ")}.` });
  draw();
  new ResizeObserver(draw).observe(plot);
}

function range(spec, series, lines) {
  if (spec.share) return [0, 1];
  const tops = [], lows = [];
  for (const [, values] of lines) {
    const known = series.map(([key]) => values[key]).filter(Number.isFinite);
    if (spec.stack) { tops.push(known.reduce((a, b) => a + b, 0)); continue; }
    const spread = (spec.band && values[spec.band]) || 0;
    tops.push(...known.map((value) => value + spread));
    lows.push(...known.map((value) => value - spread));
  }
  let low = spec.zero || spec.stack ? 0 : Math.min(...lows);
  let high = Math.max(...tops);
  if (low === high) [low, high] = low === 0 ? [0, 1] : [Math.min(0, low), Math.max(0, high)];
  const marks = ticks(low, high, 4);
  const step = marks.length > 1 ? marks[1] - marks[0] : high - low;
  return [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
}

function drawPlot({ spec, series, lines, format, plot, tip, label }) {
  const width = plot.clientWidth, height = 190;
  if (!width) return; // inside closed details: drawn when they open
  const [low, high] = range(spec, series, lines);
  const axis = ticks(low, high, 4);
  const unit = format === show.percent ? " %" : format === show.seconds ? " s" : "";
  const axisText = (value) => show.short(format === show.percent ? value * 100 : value) + unit;
  const edge = { left: 14 + 6.2 * Math.max(...axis.map((value) => axisText(value).length)), right: 18, top: 8, bottom: 24 };
  const steps = lines.map(([step]) => step);
  const [first, final] = [steps[0], steps.at(-1)];
  const inner = width - edge.left - edge.right;
  const bar = inner / lines.length;
  const x = spec.stack
    ? (index) => edge.left + (index + 0.5) * bar
    : (index) => edge.left + (final === first ? 0.5 : (steps[index] - first) / (final - first)) * inner;
  const y = (value) => edge.top + (1 - (value - low) / (high - low)) * (height - edge.top - edge.bottom);

  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label, tabindex: 0 });
  for (const value of axis) {
    root.append(svg("line", { class: value === 0 ? "grid base" : "grid", x1: edge.left, x2: width - edge.right, y1: y(value), y2: y(value) }));
    root.append(svg("text", { class: "axis", x: edge.left - 8, y: y(value) + 4, "text-anchor": "end" }, axisText(value)));
  }
  for (const step of ticks(first, final, Math.max(2, Math.min(6, Math.floor(width / 90))), true)) {
    const index = steps.findIndex((value) => value >= step);
    if (index < 0) continue;
    const place = spec.stack || first === final ? x(index) : edge.left + ((step - first) / (final - first)) * inner;
    root.append(svg("text", { class: "axis", x: place, y: height - 6, "text-anchor": "middle" }, step.toLocaleString("en")));
  }

  if (spec.stack) {
    lines.forEach(([, values], index) => {
      let below = 0;
      series.forEach(([key, , colour]) => {
        const value = values[key] || 0;
        const gap = Math.min(2, bar * 0.2);
        root.append(svg("rect", { class: colour, x: x(index) - bar / 2 + gap / 2, width: Math.max(0.5, bar - gap),
          y: y(below + value), height: Math.max(0, y(below) - y(below + value)) }));
        below += value;
      });
    });
  } else {
    series.forEach(([key, , colour]) => {
      if (spec.band) root.append(svg("path", { class: `band ${colour}`, d: bandPath(lines, key, spec.band, x, y) }));
      let path = "", pen = "M";
      lines.forEach(([, values], index) => {
        if (!Number.isFinite(values[key])) { if (!spec.join) pen = "M"; return; }
        path += `${pen}${x(index).toFixed(1)} ${y(values[key]).toFixed(1)}`;
        pen = "L";
        // few points (evaluations), or a point without neighbours, are marked
        if (lines.length <= 30) root.append(svg("circle", { class: `dot ${colour}`, cx: x(index), cy: y(values[key]), r: 3 }));
      });
      root.append(svg("path", { class: `line ${colour}`, d: path }));
    });
  }
  const cursor = svg("g", { class: "cursor" });
  root.append(cursor);
  plot.replaceChildren(root);

  let current = -1;
  function point(index) {
    current = index;
    cursor.replaceChildren();
    tip.hidden = index < 0;
    if (index < 0) return;
    const [step, values] = lines[index];
    cursor.append(svg("line", { x1: x(index), x2: x(index), y1: edge.top, y2: height - edge.bottom }));
    if (!spec.stack) series.forEach(([key, , colour]) => {
      if (Number.isFinite(values[key])) cursor.append(svg("circle", { class: `dot ${colour}`, cx: x(index), cy: y(values[key]), r: 4 }));
    });
    tip.replaceChildren(el("b", {}, `step ${step}`), ...series.filter(([key]) => Number.isFinite(values[key])).map(([key, name, colour]) =>
      el("span", { className: colour }, el("i"), `${name} `, el("b", {}, format(values[key])))));
    tip.style.left = `${Math.min(Math.max(x(index), 80), width - 80)}px`;
    tip.style.top = `${plot.offsetTop}px`;
  }
  root.addEventListener("pointermove", (event) => {
    const place = event.clientX - root.getBoundingClientRect().left;
    let nearest = 0;
    lines.forEach((_, index) => { if (Math.abs(x(index) - place) < Math.abs(x(nearest) - place)) nearest = index; });
    point(nearest);
  });
  root.addEventListener("pointerleave", () => point(-1));
  root.addEventListener("blur", () => point(-1));
  root.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    point(current < 0 ? lines.length - 1 : Math.min(lines.length - 1, Math.max(0, current + move)));
  });
}

function bandPath(lines, key, spread, x, y) {
  const known = lines.map(([, values], index) => [index, values[key], values[spread]])
    .filter(([, middle, width]) => Number.isFinite(middle) && Number.isFinite(width));
  const side = (sign) => known.map(([index, middle, width]) => `${x(index).toFixed(1)} ${y(middle + sign * width).toFixed(1)}`);
  return known.length > 1 ? `M${[...side(1), ...side(-1).reverse()].join("L")}Z` : "";
}
