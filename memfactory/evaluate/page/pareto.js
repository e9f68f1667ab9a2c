
// ---- the Pareto front over any two values of checkpoints or rows of an evaluation

/** Whether less of it is better: what it costs, and what went wrong. */
const isCost = (name) => /token|second|context|failed|length|^step$|time|turns/i.test(name);

/** Which of `points`, each {x, y}, no other point dominates: at least as good in both and better in one. */
function front(points, lessX, lessY) {
  const better = (a, b, less) => (less ? b - a : a - b);
  return points.filter((p) => !points.some((q) => {
    const [x, y] = [better(q.x, p.x, lessX), better(q.y, p.y, lessY)];
    return x >= 0 && y >= 0 && (x > 0 || y > 0);
  }));
}

function startPareto() {
  const kinds = [...new Set(data.points.map((point) => point.among))];
  const [among, selectX, selectY, wayX, wayY] = ["among", "pareto-x", "pareto-y", "way-x", "way-y"].map(byId);
  if (data.points.length < 2) return;
  byId("pareto").hidden = false;
  const options = (select, values) => select.replaceChildren(...values.map((value) => el("option", { value }, value)));
  options(among, kinds);
  among.closest("label").hidden = kinds.length < 2;

  function listValues() {
    const points = data.points.filter((point) => point.among === among.value);
    const names = [...new Set(points.flatMap((point) => Object.keys(point.values)))];
    const [x, y] = [selectX.value, selectY.value];
    options(selectX, names);
    options(selectY, names);
    selectY.value = names.includes(y) ? y : names[0];
    selectX.value = names.includes(x) ? x : names.find((name) => /^(tokens per episode|step)$/.test(name)) ?? names[1] ?? names[0];
    setWays();
  }
  function setWays() {
    for (const [way, select] of [[wayX, selectX], [wayY, selectY]]) way.value = isCost(select.value) ? "less" : "more";
    draw();
  }
  function draw() {
    const points = data.points.filter((point) => point.among === among.value)
      .map((point) => ({ ...point, x: point.values[selectX.value], y: point.values[selectY.value] }))
      .filter(({ x, y }) => Number.isFinite(x) && Number.isFinite(y));
    const best = new Set(front(points, wayX.value === "less", wayY.value === "less"));
    byId("pareto-plot").replaceChildren(...(points.length ? [drawPareto(points, best)] : [el("p", { className: "empty" }, "No point has both values.")]));
    const rows = [...points].sort((p, q) => p.x - q.x).map((point) => [fullName(point), show.number(point.x), show.number(point.y), best.has(point) ? "on the front" : "dominated"]);
    byId("pareto-table").replaceChildren(table("points", ["Point", selectX.value, selectY.value, ""], rows));
  }
  const fullName = ({ source, label }) => (data.sources.length > 1 ? `${data.sources[source].name}, ${label}` : label);

  function drawPareto(points, best) {
    const width = Math.max(280, byId("pareto-plot").clientWidth), height = Math.min(420, Math.max(260, width * 0.5));
    const [xs, ys] = [points.map(({ x }) => x), points.map(({ y }) => y)];
    const padded = (values) => {
      const [low, high] = [Math.min(...values), Math.max(...values)], room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
      return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
    };
    const [[left, right], [bottom, top]] = [padded(xs), padded(ys)];
    const edge = { left: 62, right: 20, top: 14, bottom: 44 };
    const x = (value) => edge.left + ((value - left) / (right - left)) * (width - edge.left - edge.right);
    const y = (value) => height - edge.bottom - ((value - bottom) / (top - bottom)) * (height - edge.top - edge.bottom);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "aria-label": `${selectY.value} over ${selectX.value}: ${best.size} of ${points.length} points are on the front` });
    for (const value of ticks(bottom, top, 5)) root.append(
      svg("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(value), y2: y(value) }),
      svg("text", { class: "axis", x: edge.left - 8, y: y(value) + 4, "text-anchor": "end" }, show.short(value)));
    for (const value of ticks(left, right, Math.max(2, Math.floor(width / 110)))) root.append(
      svg("text", { class: "axis", x: x(value), y: height - 26, "text-anchor": "middle" }, show.short(value)));
    root.append(svg("text", { class: "axis", x: (edge.left + width - edge.right) / 2, y: height - 6, "text-anchor": "middle" }, selectX.value));
    // stairs: what lies behind them is what the front's points have already reached
    const [head, ...rest] = [...best].sort((p, q) => p.x - q.x || p.y - q.y).map((point) => [x(point.x).toFixed(1), y(point.y).toFixed(1)]);
    const stairs = rest.map(([px, py]) => (wayX.value === "less" ? `H${px}V${py}` : `V${py}H${px}`));
    root.append(svg("path", { class: "front", d: `M${head.join(" ")}${stairs.join("")}` }));
    const labelled = [];
    for (const point of [...points].sort((p, q) => best.has(q) - best.has(p))) { // names of the front find their places first
      const [px, py] = [x(point.x), y(point.y)];
      const mark = svg("circle", { class: `${best.has(point) ? "point" : "point dominated"} s${point.source % COLOURS}`, cx: px, cy: py, r: 5.5 },
        svg("title", {}, `${fullName(point)}: ${show.number(point.x)}, ${show.number(point.y)}`));
      root.append(mark);
      const label = fullName(point).length > 40 ? `${fullName(point).slice(0, 39)}…` : fullName(point);
      const wide = label.length * 6.4;
      // beside the point, clear of the stairs and of names that stand already
      const places = [[1, -7], [-1, -7], [1, 16], [-1, 16], [1, -21], [-1, -21]].map(([side, down]) => ({ side, down, left: side > 0 ? px + 6 : px - 6 - wide }));
      const free = places.find(({ left, down }) => left > 0 && left + wide < width
        && !labelled.some((other) => left < other.right && other.left < left + wide && Math.abs(py + down - other.base) < 14));
      if (free) {
        labelled.push({ left: free.left, right: free.left + wide, base: py + free.down });
        root.append(svg("text", { class: best.has(point) ? "axis name" : "axis name dominated", x: px + 6 * free.side, y: py + free.down,
          "text-anchor": free.side > 0 ? "start" : "end" }, label));
      }
    }
    return root;
  }

  among.addEventListener("change", listValues);
  for (const select of [selectX, selectY]) select.addEventListener("change", setWays);
  for (const way of [wayX, wayY]) way.addEventListener("change", draw);
  listValues();
  new ResizeObserver(draw).observe(byId("pareto-plot"));
}
