"use strict";
// Text of models and datasets reaches the page only through text nodes (see `el`), never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An HTML element; strings among `children` become text nodes. */
function el(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** An SVG element with attributes. */
function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ---------------------------------------------------------------------------------------- numbers

const show = {
  percent: (value) => `${(value * 100).toFixed(1)} %`,
  seconds: (value) => `${value.toFixed(value < 10 ? 2 : 1)} s`,
  number(value) {
    if (value === 0 || Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    if (size < 0.001 || size >= 1e6) return value.toExponential(1);
    return size < 1 ? value.toFixed(3) : size < 100 ? value.toFixed(2) : value.toFixed(0);
  },
  /** For round numbers: no zeros at the end. */
  short: (value) => (value !== 0 && Math.abs(value) < 0.001 ? value.toExponential() : Number(value.toPrecision(6)).toLocaleString("en")),
};
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + show.number(Math.abs(value));

/** About `count` round numbers that span low..high. */
function ticks(low, high, count, whole = false) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)) + 0); // + 0: no -0
  return found;
}

// ----------------------------------------------------------------------------------------- charts

/** Names X of the training metrics that are called `before`X`after`. */
const named = (before, after = "") => [...new Set(data.metrics.train.flatMap(([, values]) => Object.keys(values)))]
  .filter((key) => key.startsWith(before) && key.endsWith(after) && key.length > before.length + after.length)
  .map((key) => key.slice(before.length, key.length - after.length));

const COLOURS = 6;
/** One chart, or as many as it takes for each series to have a colour of its own. */
function split(spec) {
  const count = Math.ceil(spec.series.length / COLOURS);
  return Array.from({ length: count }, (_, i) => ({ ...spec, title: count > 1 ? `${spec.title}, ${i + 1} of ${count}` : spec.title,
    series: spec.series.slice(i * COLOURS, (i + 1) * COLOURS) }));
}

// a fault class is logged only at the steps where it occurred
const faults = named("faults/");
for (const [, values] of data.metrics.train) for (const name of faults) values[`faults/${name}`] ??= 0;

// A series is [metric name, label]; `place` is the element it goes to, `share` fixes the axis to 0..100 %, `zero` starts it at 0, and
// `parts` says that the later series make up the first, so those that are always 0 are left out; `some` leaves out any such.
const CHARTS = [
  { title: "Accuracy", note: "Held-out tasks.", phase: "eval", share: true,
    series: [["sampled_em", "sampled"], ["greedy_em", "greedy"]] },
  { title: "Reward", note: "Mean over the step's episodes; the band is one standard deviation.", phase: "train",
    series: [["reward", "reward"]], band: "reward_std" },
  { title: "Evidence in memory", note: "Captured: noted when its chunk was read. Retained: kept from one chunk to the next.", phase: "eval", share: true,
    series: [["sampled_capture", "captured"], ["sampled_retain", "retained"]] },
  { title: "Dead groups", note: "Groups whose episodes all got the same reward: they teach nothing.", phase: "train", share: true,
    series: [["groups/dead_share", "dead"], ["groups/solved_share", "all right"], ["groups/failed_share", "all wrong"],
             ["groups/tied_share", "all equal"], ["groups/unmeasured_share", "not measured"]], parts: true },
  { title: "Entropy", note: "Of the policy, in nats per token.", phase: "train", zero: true, series: [["entropy", "entropy"]] },
  { title: "Turns", note: "Decisions of the policy per episode.", phase: "train", zero: true, series: [["turns/per_episode", "per episode"]] },
  { title: "Rows", note: "Training sequences per step; rows of dead groups are not trained.", phase: "train", zero: true,
    series: [["rows/count", "made"], ["rows/trained", "trained"]] },
  { title: "Completion length", note: "Tokens per turn.", phase: "train", zero: true, series: [["completions/mean_length", "mean"]] },
  { title: "Time per step", note: "Where the seconds go.", phase: "train", stack: true, wide: true, format: show.seconds,
    series: [["time/generate", "generate"], ["time/reward", "reward"], ["time/train", "train"],
             ["time/optimizer", "optimizer"], ["time/other", "other"], ["time/wait", "wait for episodes"]] },
  { title: "Loss", phase: "train", more: true, series: [["loss", "loss"]] },
  { title: "Gradient norm", phase: "train", more: true, zero: true, series: [["grad_norm", "norm"]] },
  { title: "Learning rate", phase: "train", more: true, zero: true, series: [["learning_rate", "rate"]] },
  { title: "Turns gone wrong", note: "Cut by the token limit, or written so that the module could not use it.", phase: "train", more: true, share: true,
    series: [["stop/length_share", "cut"], ["turns/unusable_share", "unusable"]] },
  { title: "Clipped tokens", phase: "train", more: true, zero: true, format: show.percent, series: [["clip_ratio/region_mean", "share of tokens"]] },
  { title: "Episodes", note: "Failed ones could not be measured and are in no baseline.", phase: "train", more: true, zero: true,
    series: [["episodes/count", "all"], ["episodes/failed", "failed"]] },
  { title: "Tokens per step", phase: "train", more: true, zero: true, series: [["tokens/generated", "generated"], ["tokens/trained", "trained"]] },
  { title: "Real tokens", note: "Share of computed token positions that are no padding.", phase: "train", more: true, share: true,
    series: [["tokens/real_over_computed", "share"]] },
  { title: "Warm-up loss", note: "Supervised steps before training.", phase: "warmup", more: true, zero: true, series: [["loss", "loss"]] },
];

const series = (names, key) => names.map((name) => [`rewards/${name}/${key}`, name]);
const REWARD_CHARTS = [
  ...split({ title: "Reward dimensions", note: "Mean of each, before weighting.", series: series(named("rewards/", "/mean"), "mean") }),
  ...split({ title: "Gate pass rate", note: "Share of scores at or above the gate's threshold; without a score it fails.", share: true,
    series: series(named("rewards/", "/pass_rate"), "pass_rate") }),
  ...split({ title: "Parts of the reward", note: "What the aggregator makes it of, mean over the episodes.", zero: true,
    series: named("reward/").map((name) => [`reward/${name}`, name]) }),
  ...split({ title: "Not measured", note: "Share of scores that are None, of dimensions that have some.", share: true, some: true,
    series: series(named("rewards/", "/none_share"), "none_share") }),
  ...split({ title: "Faults", note: "Failed measurements per step, by whose fault they are.", zero: true, some: true,
    series: faults.map((name) => [`faults/${name}`, name]) }),
].map((spec) => ({ ...spec, phase: "train", place: "reward-charts" }));
const SPREAD_CHARTS = named("rewards/", "/std").map((name) => ({ title: name, note: "The band is one standard deviation.",
  phase: "train", place: "reward-more-charts", series: [[`rewards/${name}/mean`, "mean"]], band: `rewards/${name}/std` }));

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
  const all = data.metrics[spec.phase];
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
        if (!Number.isFinite(values[key])) { pen = "M"; return; }
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

[...CHARTS, ...REWARD_CHARTS, ...SPREAD_CHARTS].forEach(addChart);
if (!byId("charts").children.length) byId("charts").append(el("p", { className: "empty" }, "No metrics yet."));
for (const name of ["more", "reward-more"]) byId(name).hidden = !byId(`${name}-charts`).children.length;

// ---------------------------------------------------------------------------------------- rewards

const known = (value, format = show.number) => (Number.isFinite(value) ? format(value) : "–");

/** A table; `rows` are table rows, or arrays of nodes or texts whose first is the header of its row. */
function table(className, heads, rows) {
  const cellOf = (cell) => (cell instanceof HTMLTableCellElement ? cell : el("td", {}, cell));
  const rowOf = ([head, ...cells]) => el("tr", {}, el("th", { scope: "row" }, head), cells.map(cellOf));
  return el("div", { className: "scroll" }, el("table", { className },
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, rows.map((row) => (Array.isArray(row) ? rowOf(row) : row)))));
}

/** First and last value; only one where they are the same. The full numbers are in the tooltip. */
function change([first, last], format = show.number) {
  if (first === null && last === null) return el("td", {}, "–");
  const full = [first, last].map((value) => value ?? "–");
  if (known(first, format) === known(last, format)) return el("td", { title: full[0] === full[1] ? full[0] : full.join(" → ") }, known(last, format));
  return el("td", { title: full.join(" → ") }, known(first, format),
    el("span", { className: "sr" }, " to "), el("span", { ariaHidden: "true" }, " → "), el("b", {}, known(last, format)));
}

/** Why scores of a dimension are None, as a row of its own: at the left it is in sight also on a narrow screen. */
function reasonsRow(row, columns) {
  const reasons = row.reasons.map(([reason, count]) => el("li", {}, `${show.number(count)} × `, reason));
  if (row.more_reasons) reasons.push(el("li", {}, `and ${row.more_reasons} other reasons`));
  return el("tr", { className: "reasons" }, el("td", { colSpan: columns }, el("ul", { ariaLabel: `Reasons for None of ${row.name}` }, reasons)));
}

const stepsText = ([first, last]) => (first === last ? `step ${first}` : `steps ${first} to ${last}`);

function dimensionTable(rewards) {
  const heads = ["Dimension", "Role", "Scope", "Weight", "Mean", "Spread", "Pass rate", "None"];
  const rows = rewards.dimensions.flatMap((row) => [
    [row.name, row.role, row.scope, change(row.weight, show.short), change(row.mean), change(row.std),
      row.role === "gate" ? change(row.pass_rate, show.percent) : "",
      el("td", { title: row.none_share ?? "" }, known(row.none_share, show.percent))],
    ...(row.reasons.length ? [reasonsRow(row, heads.length)] : []),
  ]);
  return [
    el("p", { className: "hint" }, `First and last logged step of ${stepsText(rewards.steps)}, before weighting. None: share of scores that could not be measured, mean over the logged steps, with the most common reasons below.`),
    table("dimensions", heads, rows),
  ];
}

function heatMap({ names, matrix, steps, count }) {
  // column heads are numbers: names would make the columns as wide as they are long
  const number = (k) => el("span", { className: "number" }, k + 1);
  const rows = names.map((name, i) => [[number(i), name], ...matrix[i].map((value, j) => {
    if (value === null) return el("td", { className: "heat", title: "One of the two did not vary." }, "–");
    const cell = el("td", { className: value < 0 ? "heat below" : "heat", title: `${name} and ${names[j]}: ${value}` }, value.toFixed(2).replace("-", "−"));
    cell.style.setProperty("--share", `${Math.round(Math.abs(value) * 45)}%`);
    return cell;
  })]);
  const heads = ["Dimension", ...names.map((name, k) => [number(k), el("span", { className: "sr" }, name)])];
  return [
    el("h3", {}, "Correlation"),
    el("p", { className: "hint" }, `Pearson, between the scores of a step's episodes; ${count > 1 ? `mean over the last ${count} logged steps (${steps[0]} to ${steps[1]})` : `of ${stepsText(steps)}`}. A dash: one of the two did not vary.`),
    table("correlation", heads, rows),
  ];
}

const scoreOf = ({ name, value }) => [el("span", {}, name), " ", el("b", { title: value }, show.number(value))];

function disagreementList(items) {
  const rows = items.map((item) => {
    const episode = disagreeing(item);
    const link = episode ? el("a", { href: hashOf(episode) }, item.episode) : el("span", { title: "It is not among the episodes of this page." }, item.episode || "no id");
    return [link, String(item.step), el("td", { title: item.gap }, show.percent(item.gap)), scoreOf(item.high), scoreOf(item.low)];
  });
  return [
    el("h3", {}, "Where dimensions disagree most"),
    el("p", { className: "hint" }, "Episodes that one dimension puts high among those of their step and another low: where a reward is gamed or wrong, it shows here first. The gap is how far their ranks lie apart: 100 % is best on the one, worst on the other."),
    table("disagreements", ["Episode", "Step", "Gap", "High", "Low"], rows),
  ];
}

function faultList({ count, examples, tracebacks }) {
  const shown = (items) => items.map(([step, text]) => el("li", {}, el("h5", {}, `step ${step}`), el("pre", { className: "text" }, text)));
  return [
    el("h3", {}, "Faults"),
    el("p", { className: "hint" }, "Measurements that failed, by whose fault it was, over the logged steps."),
    table("faults", ["Class", "Count"], Object.entries(count).map(([name, number]) => [name, show.number(number)])),
    examples.length ? el("details", { className: "examples" }, el("summary", {}, "First examples"), el("ol", {}, shown(examples)),
      tracebacks.length ? [el("h4", {}, "Tracebacks"), el("ol", {}, shown(tracebacks))] : null) : null,
  ];
}

/** The address of an episode on this page. */
const hashOf = (episode) => `#episode/${[episode.split, episode.step, episode.id].map(encodeURIComponent).join("/")}`;
const disagreeing = (item) => data.episodes.find((episode) => item.episode && episode.split === "train" && episode.step === item.step && episode.id === item.episode);

function showRewards(rewards) {
  const { correlation, disagreements, faults } = rewards;
  byId("reward-table").replaceChildren(...dimensionTable(rewards));
  byId("reward-details").replaceChildren(...[
    ...(correlation && correlation.names.length > 1 ? heatMap(correlation) : []),
    ...(disagreements.length ? disagreementList(disagreements) : []),
    ...(Object.keys(faults.count).length ? faultList(faults) : []),
  ].filter(Boolean));
}

if (data.rewards) showRewards(data.rewards);
else if (!byId("reward-charts").children.length) byId("reward-table").append(el("p", { className: "empty" }, "No rewards were logged."));

// ------------------------------------------------------------------------------------ differences

/** Words and the spaces between them. */
const words = (text) => text.match(/\s+|[^\s]+/g) || [];

/** Word-level difference by longest common subsequence: [[kind, text], ...], kind one of same, del, ins. */
function difference(before, after) {
  const a = words(before), b = words(after);
  let start = 0, end = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const [p, q] = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
  const parts = [["same", a.slice(0, start).join("")]];
  if (p.length * q.length > 4e6) {
    parts.push(["del", p.join("")], ["ins", q.join("")]); // too long to compare word by word
  } else {
    const row = q.length + 1;
    const common = new Uint32Array((p.length + 1) * row); // common[i, j]: longest common subsequence of p[i..], q[j..]
    for (let i = p.length - 1; i >= 0; i--)
      for (let j = q.length - 1; j >= 0; j--)
        common[i * row + j] = p[i] === q[j] ? common[(i + 1) * row + j + 1] + 1 : Math.max(common[(i + 1) * row + j], common[i * row + j + 1]);
    let i = 0, j = 0;
    while (i < p.length || j < q.length) {
      if (i < p.length && j < q.length && p[i] === q[j]) { parts.push(["same", p[i]]); i++; j++; }
      else if (j === q.length || (i < p.length && common[(i + 1) * row + j] >= common[i * row + j + 1])) parts.push(["del", p[i++]]);
      else parts.push(["ins", q[j++]]);
    }
  }
  parts.push(["same", a.slice(a.length - end).join("")]);
  return parts;
}

/** One side of a difference: `side` is "del" for the text before, "ins" for the text after. */
function marked(parts, side) {
  const pieces = [];
  for (const [kind, text] of parts) {
    if (!text || (kind !== "same" && kind !== side)) continue;
    const tail = pieces.at(-1);
    if (tail && tail[0] === kind) tail[1] += text;
    else pieces.push([kind, text]);
  }
  return pieces.map(([kind, text]) => (kind === "same" ? text : el(kind, {}, text)));
}

/** `text` with every occurrence of the `spans` marked. */
function highlighted(text, spans) {
  const nodes = [];
  let rest = text;
  for (;;) {
    const hits = spans.filter(Boolean).map((span) => [rest.indexOf(span), span]).filter(([at]) => at >= 0);
    if (!hits.length) return [...nodes, rest];
    const [at, span] = hits.reduce((a, b) => (b[0] < a[0] ? b : a));
    nodes.push(rest.slice(0, at), el("mark", { title: "evidence" }, span));
    rest = rest.slice(at + span.length);
  }
}

// --------------------------------------------------------------------------------------- episodes

const rewardText = (reward) => (reward === null ? "n/a" : show.number(reward));
const rewardClass = (reward) => (reward === null ? "none" : reward > 0 ? "good" : "bad");
const signClass = (value) => (value > 0 ? "up" : value < 0 ? "down" : "flat");

function block(title, className, ...content) {
  const body = el("div", { className: "text" }, ...content);
  if (!body.textContent) body.replaceChildren(el("em", {}, "empty"));
  return el("div", { className: `block ${className}` }, el("h5", {}, title), body);
}

function turnCard(turn, number, episode) {
  const reads = turn.chunk !== null;
  const count = new Set(episode.turns.map((other) => other.chunk).filter((chunk) => chunk !== null)).size;
  const chips = [
    el("span", { className: turn.stop === "length" ? "chip warn" : "chip" }, turn.stop === "length" ? "cut by the token limit" : "ended by itself"),
    el("span", { className: "chip" }, `${turn.prompt_tokens} → ${turn.completion_tokens} tokens`),
    turn.trainable ? el("span", { className: `chip ${signClass(turn.advantage || 0)}` }, `advantage ${signed(turn.advantage || 0)}`) : el("span", { className: "chip" }, "not trained"),
  ];
  const evidence = episode.probes.flatMap((probe) => probe.evidence).filter((item) => item.chunk === turn.chunk).map((item) => item.text);
  const changed = turn.memory_before !== turn.memory_after;
  const asWritten = changed && turn.text.trim() === turn.memory_after.trim();
  const panes = [];
  if (turn.chunk_text !== null) panes.push(block("Chunk", "chunk", highlighted(turn.chunk_text, evidence)));
  if (reads || changed) {
    const parts = difference(turn.memory_before, turn.memory_after);
    panes.push(block("Memory before", "before", marked(parts, "del")), block(`Memory after${asWritten ? ", as written" : changed ? "" : ", unchanged"}`, "after", marked(parts, "ins")));
  } else {
    panes.push(block("Memory", "after", turn.memory_before));
  }
  const prompt = el("details", {}, el("summary", {}, `Full prompt, ${turn.prompt_tokens} tokens`));
  prompt.addEventListener("toggle", () => {
    if (prompt.children.length === 1) prompt.append(...turn.messages.map((message) => block(message.role, "message", message.content)));
  });
  return el("li", { className: "turn" },
    el("header", {}, el("h4", {}, el("span", { className: "number" }, number + 1), turn.module, reads ? el("small", {}, `chunk ${turn.chunk + 1} of ${count}`) : null), el("div", { className: "chips" }, chips)),
    turn.error ? el("p", { className: "error" }, turn.error) : null,
    el("div", { className: `panes n${panes.length}` }, panes),
    asWritten ? null : block("Text as written", "written", turn.text),
    ...memoryUse(turn),
    scoreTable(turn.scores ?? {}),
    prompt);
}

/** What the turn asked the memory to do and what it was shown of it, for agents that keep entries. */
function memoryUse({ operations = [], retrieved = [], cited = [] }) {
  const shown = new Set(retrieved.map((entry) => entry.id));
  const list = (title, className, items) => (items.length
    ? el("div", { className: `block ${className}` }, el("h5", {}, title), el("ul", { className: "entries" }, items.map((item) => el("li", {}, item)))) : null);
  return [
    list("Operations", "operations", operations.map(({ verb, target, text, error }) => [
      el("b", {}, verb), target ? [" ", el("code", {}, target)] : null, text ? ` ${text}` : null, error ? el("p", { className: "error" }, error) : null].flat())),
    list("Retrieved", "retrieved", retrieved.map(({ id, text }) => [
      el("code", {}, id), " ", cited.includes(id) ? el("span", { className: "chip up" }, "cited") : null, ` ${text}`])),
    list("Cited without having been retrieved", "strays", cited.filter((id) => !shown.has(id)).map((id) => [el("code", {}, id)])),
  ];
}

function scoreTable(scores) {
  const all = Object.entries(scores);
  const why = all.some(([, score]) => score.reason);
  const rows = all.map(([name, score]) => [name,
    el("td", { className: "value" }, score.value === null ? el("em", {}, "not measured") : show.number(score.value)),
    ...(why ? [score.reason] : [])]);
  return rows.length ? table("scores", ["Dimension", "Score", ...(why ? ["Reason"] : [])], rows) : null;
}

function showEpisode(episode) {
  const target = byId("episode");
  if (!episode) {
    target.replaceChildren(el("p", { className: "empty" }, "No episode fits."));
    return;
  }
  const probes = episode.probes.map((probe, index) => {
    const answer = episode.answers[index];
    return el("section", { className: "probe" },
      el("h3", {}, probe.question),
      el("dl", {},
        el("div", {}, el("dt", {}, "Gold"), el("dd", {}, probe.answers.join("  or  ") || "–")),
        el("div", {}, el("dt", {}, "Answer"), el("dd", { className: "answer" },
          answer && answer.text !== null ? answer.text : el("em", {}, answer ? "none could be read" : "never asked")))));
  });
  const fact = (label, ...content) => el("div", {}, el("dt", {}, label), el("dd", {}, ...content));
  const apart = (data.rewards?.disagreements ?? []).find((item) => disagreeing(item) === episode);
  target.replaceChildren(
    ...probes,
    el("dl", { className: "episode-facts" },
      fact("Reward", el("b", { className: `pill ${rewardClass(episode.reward)}` }, rewardText(episode.reward))),
      fact("Advantage", signed(episode.advantage || 0)),
      fact("Task", episode.task),
      episode.group ? fact("Group", episode.group) : null,
      episode.id ? fact("Episode", episode.id) : null,
      apart ? fact("Dimensions disagree", "high: ", ...scoreOf(apart.high), ", low: ", ...scoreOf(apart.low)) : null),
    scoreTable(episode.scores) ?? "",
    el("ol", { className: "turns" }, episode.turns.map((turn, number) => turnCard(turn, number, episode))));
}

const FILTERS = {
  all: () => true,
  positive: (episode) => episode.reward > 0,
  zero: (episode) => episode.reward !== null && episode.reward <= 0,
  unmeasured: (episode) => episode.reward === null,
  error: (episode) => episode.turns.some((turn) => turn.error),
  length: (episode) => episode.turns.some((turn) => turn.stop === "length"),
};

function fits(episode, wanted) {
  const texts = [episode.task, episode.id, ...episode.probes.flatMap((probe) => [probe.question, ...probe.answers]), ...episode.answers.map((answer) => answer.text || "")];
  return texts.some((text) => text.toLowerCase().includes(wanted));
}

function startViewer() {
  const [split, step, filter, sort, find] = ["split", "step", "filter", "sort", "find"].map(byId);
  const unique = (values) => [...new Set(values)];
  const options = (select, values) => select.replaceChildren(...values.map((value) => el("option", { value }, String(value))));

  function listSteps() {
    const wanted = step.value;
    const steps = unique(data.episodes.filter((episode) => episode.split === split.value).map((episode) => episode.step)).sort((a, b) => a - b);
    options(step, steps);
    step.value = steps.map(String).includes(wanted) ? wanted : String(steps.at(-1));
    listEpisodes();
  }

  /** Open the episode that the address names, if it names one. */
  function follow() {
    const episode = data.episodes.find((one) => one.id && hashOf(one) === location.hash);
    if (!episode) return;
    [split.value, filter.value, find.value] = [episode.split, "all", ""];
    listSteps();
    step.value = String(episode.step);
    listEpisodes(episode);
    byId("episodes").scrollIntoView();
    byId("list").querySelector("[aria-current]").focus({ preventScroll: true });
  }

  function listEpisodes(open = null) {
    const here = data.episodes.filter((episode) => episode.split === split.value && String(episode.step) === step.value);
    const wanted = find.value.trim().toLowerCase();
    const found = here.filter((episode) => FILTERS[filter.value](episode) && (!wanted || fits(episode, wanted)));
    const worth = (episode) => episode.reward ?? -Infinity;
    if (sort.value === "best") found.sort((a, b) => worth(b) - worth(a));
    if (sort.value === "worst") found.sort((a, b) => worth(a) - worth(b));
    byId("count").textContent = `${found.length} of ${here.length} episodes`;
    byId("step-back").disabled = step.selectedIndex <= 0;
    byId("step-on").disabled = step.selectedIndex >= step.options.length - 1;
    const buttons = found.map((episode) => {
      const button = el("button", { type: "button" },
        el("b", { className: `pill ${rewardClass(episode.reward)}` }, rewardText(episode.reward)),
        el("span", {}, episode.probes[0]?.question || episode.task));
      button.addEventListener("click", () => choose(button, episode));
      return button;
    });
    byId("list").replaceChildren(...buttons.map((button) => el("li", {}, button)));
    const first = Math.max(0, found.indexOf(open));
    if (found.length) choose(buttons[first], found[first]);
    else showEpisode(null);
    if (open) buttons[first]?.scrollIntoView({ block: "nearest" });
  }

  function choose(button, episode) {
    for (const other of byId("list").querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
    showEpisode(episode);
  }

  function move(by) {
    step.selectedIndex += by;
    listEpisodes();
  }

  options(split, unique(data.episodes.map((episode) => episode.split)));
  split.addEventListener("change", listSteps);
  for (const control of [step, filter, sort]) control.addEventListener("change", () => listEpisodes());
  find.addEventListener("input", () => listEpisodes());
  byId("step-back").addEventListener("click", () => move(-1));
  byId("step-on").addEventListener("click", () => move(1));
  window.addEventListener("hashchange", follow);
  // the address does not change when the same link is followed again
  byId("reward-details").addEventListener("click", (event) => { if (event.target.closest("a")?.hash === location.hash) follow(); });
  listSteps();
  follow();
}

if (data.episodes.length) startViewer();
