
// ---- rewards: the table of dimensions, correlation, disagreements, faults

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

function disagreementList(items, source) {
  const rows = items.map((item) => {
    const episode = disagreeing(item, source);
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

/** The entry of the episode that a disagreement of run number `source` names. */
const disagreeing = (item, source) => entries.find((entry) => item.episode && entry.source === source && entry.split === "train"
  && entry.step === item.step && entry.id === item.episode);

function rewardDetails({ correlation, disagreements, faults }, source) {
  return [
    ...(correlation && correlation.names.length > 1 ? heatMap(correlation) : []),
    ...(disagreements.length ? disagreementList(disagreements, source) : []),
    ...(Object.keys(faults.count).length ? faultList(faults) : []),
  ].filter(Boolean);
}

/** Tables of a single run stand open, those of several are closed under their names. */
function showRewards() {
  const having = data.sources.map((source, number) => [source, number]).filter(([source]) => source.rewards);
  if (data.sources.length === 1) {
    for (const [{ rewards }, number] of having) {
      byId("reward-table").replaceChildren(...dimensionTable(rewards));
      byId("reward-details").replaceChildren(...rewardDetails(rewards, number));
    }
  } else {
    byId("reward-details").replaceChildren(...having.map(([{ name, rewards }, number]) =>
      el("details", {}, el("summary", {}, `Dimensions, correlation and faults of ${name}`), dimensionTable(rewards), rewardDetails(rewards, number))));
  }
  if (!having.length && !byId("reward-charts").children.length) byId("reward-table").append(el("p", { className: "empty" }, "No rewards were logged."));
}
