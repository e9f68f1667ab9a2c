
// ---- the list of episodes: filters, sorting, and what is worth sorting by

const FILTERS = {
  all: () => true,
  positive: (entry) => entry.reward > 0,
  zero: (entry) => entry.reward !== null && entry.reward <= 0,
  unmeasured: (entry) => entry.reward === null,
  score: (entry) => entry.unmeasured.length > 0,
  failed: (entry) => entry.failed !== "",
  error: (entry) => entry.errors > 0,
  length: (entry) => entry.cut > 0,
  judge: (entry) => { const pair = verdictsOf(entry); return pair !== null && pair.rule >= 0.5 !== pair.judge >= 0.5; },
};

/** What the rule and the judge made of the same answers; null where one of them did not speak. */
function verdictsOf(entry) {
  const metric = data.sources[entry.source].judged[entry.split];
  const [rule, judge] = [entry.scores[metric] ?? null, entry.scores[data.judge] ?? null];
  return metric === undefined || rule === null || judge === null ? null : { metric, rule, judge };
}

/** What went wrong in an episode: whose fault it was that it could not be run, or else what was not usable of it. */
function faultsOf(entry) {
  if (entry.failed !== "") return [entry.failed.split(": ")[0]];
  return [...(entry.errors ? ["model"] : []), ...entry.unmeasured.map((k) => `not measured: ${data.dimensions[k]}`)];
}
const CHUNK = 100; // entries of the list that are made at a time, as one scrolls

/** The runs of episodes that are comparable by rank: of one source, split, candidate and mode. */
const scopeOf = (entry) => JSON.stringify([entry.source, entry.split, entry.candidate, entry.mode]);
const groupOf = (entry) => JSON.stringify([scopeOf(entry), entry.step, entry.candidate ? entry.task : entry.group || entry.task]);

function grouped(items, keyOf) {
  const groups = new Map();
  for (const item of items) {
    const key = keyOf(item);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(item);
  }
  return [...groups.values()];
}

/** By entry, its place among `items` in the order of dimension `name`, in [0, 1]; equal values share one. */
function ranks(items, name) {
  const sorted = items.filter((entry) => Number.isFinite(entry.scores[name])).sort((a, b) => a.scores[name] - b.scores[name]);
  const found = new Map();
  for (let start = 0, end; start < sorted.length; start = end) {
    for (end = start + 1; end < sorted.length && sorted[end].scores[name] === sorted[start].scores[name];) end++;
    for (let k = start; k < end; k++) found.set(sorted[k], sorted.length > 1 ? (start + end - 1) / 2 / (sorted.length - 1) : 0.5);
  }
  return found;
}

/** By entry, how far its ranks in two dimensions lie apart. */
function disagreement(a, b) {
  const found = new Map();
  for (const items of grouped(entries, scopeOf)) {
    const [one, other] = [ranks(items, a), ranks(items, b)];
    for (const [entry, rank] of one) if (other.has(entry)) found.set(entry, Math.abs(rank - other.get(entry)));
  }
  return found;
}

/** By entry, the standard deviation of `valueOf` in its group. */
function spread(valueOf) {
  const found = new Map();
  for (const items of grouped(entries, groupOf)) {
    const values = items.map(valueOf).filter(Number.isFinite);
    if (!values.length) continue;
    const mean = values.reduce((a, b) => a + b) / values.length;
    const deviation = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length);
    for (const entry of items) found.set(entry, deviation);
  }
  return found;
}

/** What episodes are sorted and filtered by: [name on the page, what it is of the dimensions chosen as A and B]. */
const MEASURES = {
  reward: ["reward", () => (entry) => entry.reward],
  advantage: ["advantage", () => (entry) => entry.advantage],
  tokens: ["length, tokens", () => (entry) => entry.tokens],
  turns: ["length, turns", () => (entry) => entry.turns],
  errors: ["turns with an error", () => (entry) => entry.errors],
  apart: ["disagreement of A and B", (a, b) => { const found = disagreement(a, b); return (entry) => found.get(entry) ?? null; }],
  spread: ["spread of A in the group", (a) => { const found = spread((entry) => entry.scores[a]); return (entry) => found.get(entry) ?? null; }],
  spreadReward: ["spread of reward in the group", () => { const found = spread((entry) => entry.reward); return (entry) => found.get(entry) ?? null; }],
  ...Object.fromEntries(data.dimensions.map((name) => [`score:${name}`, [name, () => (entry) => entry.scores[name] ?? null]])),
};

function fits(entry, wanted) {
  return [entry.task, entry.id, entry.question, entry.gold, entry.answer, entry.failed].some((text) => text.toLowerCase().includes(wanted));
}

function startBrowser() {
  const names = ["source", "split", "candidate", "mode", "step", "filter", "fault", "sort", "way", "find", "measure", "bound", "limit", "a", "b"];
  const control = Object.fromEntries(names.map((name) => [name, byId(name)]));
  const { step, filter, fault, sort, way, find, measure, bound, limit, a, b } = control;
  const unique = (values) => [...new Set(values)];
  const options = (select, pairs) => select.replaceChildren(...pairs.map(([value, text]) => el("option", { value }, String(text))));
  const same = (values) => values.map((value) => [value, value]);
  const PLACES = ["source", "split", "candidate", "mode"]; // each offers what there is for the choices before it
  let found = [], made = 0, current = null;

  /** Entries that fit the choices before number `count` of PLACES. */
  const at = (count) => entries.filter((entry) => PLACES.slice(0, count).every((name) => String(entry[name]) === control[name].value));

  function listPlaces(from = 0) {
    PLACES.forEach((name, k) => {
      if (k < from) return;
      const before = control[name].value;
      const values = unique(at(k).map((entry) => String(entry[name])));
      options(control[name], values.map((value) => [value, name === "source" ? data.sources[value].name : value]));
      if (values.includes(before)) control[name].value = before;
      control[name].closest("label").hidden = values.length < 2 && (name !== "split" || data.sources[entries[0].source].kind === "evaluation");
    });
    const wanted = step.value;
    const steps = unique(at(PLACES.length).map((entry) => entry.step)).sort((x, y) => x - y);
    options(step, [...same(steps), ...(steps.length > 1 ? [["all", "all"]] : [])]);
    step.value = [...steps.map(String), "all"].includes(wanted) && (wanted !== "all" || steps.length > 1) ? wanted : String(steps.at(-1));
    step.closest(".stepper").hidden = steps.length < 2 && steps[0] === 0;
    listFaults();
    listEpisodes();
  }

  /** Offer the faults that there are in what was chosen, the most frequent first. */
  function listFaults() {
    const before = fault.value, counts = new Map();
    let without = 0;
    for (const entry of at(PLACES.length)) {
      const own = faultsOf(entry);
      if (!own.length) without += 1;
      for (const name of own) counts.set(name, (counts.get(name) ?? 0) + 1);
    }
    const ordered = [...counts].sort(([, x], [, y]) => y - x);
    options(fault, [["", "any or none"], ["none", `none (${without})`], ...ordered.map(([name, count]) => [`is ${name}`, `${name} (${count})`])]);
    if ([...fault.options].some(({ value }) => value === before)) fault.value = before;
    fault.closest("label").hidden = !counts.size;
  }

  /** Whether the fault that was chosen came up in `entry`. */
  function faulty(entry) {
    if (fault.value === "") return true;
    const own = faultsOf(entry);
    return fault.value === "none" ? !own.length : own.some((name) => fault.value === `is ${name}`);
  }

  /** Open the episode that the address names, if it names one. */
  function follow() {
    if (!location.hash) return;
    const entry = entries.find((one) => one.id && hashOf(one) === location.hash);
    if (!entry) return;
    for (const [k, name] of PLACES.entries()) { control[name].value = String(entry[name]); listPlaces(k + 1); }
    [filter.value, fault.value, find.value, limit.value, step.value] = ["all", "", "", "", String(entry.step)];
    listEpisodes(entry);
    byId("episodes").scrollIntoView();
    byId("list").querySelector("[aria-current]").focus({ preventScroll: true });
  }

  function listEpisodes(open = null) {
    const here = at(PLACES.length).filter((entry) => step.value === "all" || String(entry.step) === step.value);
    const wanted = find.value.trim().toLowerCase();
    const valueOf = (name) => MEASURES[name][1](a.value, b.value);
    const edge = limit.value === "" ? null : Number(limit.value);
    const bounded = edge === null ? null : valueOf(measure.value);
    const inside = (value) => Number.isFinite(value) && (bound.value === "least" ? value >= edge : value <= edge);
    found = here.filter((entry) => FILTERS[filter.value](entry) && faulty(entry) && (!wanted || fits(entry, wanted)) && (!bounded || inside(bounded(entry))));
    let shown = (entry) => entry.reward;
    if (sort.value !== "logged") {
      shown = valueOf(sort.value);
      const sign = way.value === "down" ? -1 : 1;
      const [known, unknown] = [found.filter((entry) => Number.isFinite(shown(entry))), found.filter((entry) => !Number.isFinite(shown(entry)))];
      found = [...known.sort((x, y) => sign * (shown(x) - shown(y))), ...unknown];
    }
    byId("way-label").hidden = sort.value === "logged";
    byId("count").textContent = `${found.length} of ${here.length} episodes`;
    byId("step-back").disabled = step.selectedIndex <= 0;
    byId("step-on").disabled = step.selectedIndex >= step.options.length - 1;
    made = 0;
    byId("list").replaceChildren();
    byId("list").scrollTop = 0;
    const first = Math.max(0, found.indexOf(open));
    more(shown, first + CHUNK);
    byId("list").onscroll = () => { const list = byId("list"); if (list.scrollTop + list.clientHeight > list.scrollHeight - 300) more(shown, made + CHUNK); };
    if (found.length) choose(byId("list").children[first].firstChild, found[first]);
    else showEpisode(null);
    if (open) byId("list").children[first]?.scrollIntoView({ block: "nearest" });
  }

  /** Make the list longer, up to `count` entries. */
  function more(shown, count) {
    const items = found.slice(made, count).map((entry) => {
      const value = shown(entry) ?? null;
      const pill = sort.value === "logged" || sort.value === "reward" ? rewardClass(value) : "none";
      const button = el("button", { type: "button" }, el("b", { className: `pill ${pill}` }, rewardText(value)), el("span", {}, entry.question || entry.task));
      button.addEventListener("click", () => choose(button, entry));
      return el("li", {}, button);
    });
    made += items.length;
    byId("list").append(...items);
  }

  function choose(button, entry) {
    current?.removeAttribute("aria-current");
    current = button;
    button.setAttribute("aria-current", "true");
    showEpisode(entry);
  }

  function move(by) {
    step.selectedIndex += by;
    listEpisodes();
  }

  const measures = Object.entries(MEASURES).map(([value, [text]]) => [value, text])
    .filter(([value]) => (value !== "apart" || data.dimensions.length > 1) && (value !== "spread" || data.dimensions.length));
  options(sort, [["logged", "as logged"], ...measures]);
  options(measure, measures);
  options(a, same(data.dimensions));
  options(b, same(data.dimensions));
  if (data.dimensions.length > 1) b.selectedIndex = 1;
  const judged = data.sources.flatMap((source) => Object.values(source.judged));
  if (judged.length && data.dimensions.includes(data.judge)) [a.value, b.value] = [judged[0], data.judge];
  else filter.querySelector("[value=judge]").remove();
  for (const select of [a, b]) select.closest("label").hidden = data.dimensions.length < 2;
  PLACES.forEach((name, k) => control[name].addEventListener("change", () => listPlaces(k + 1)));
  for (const name of ["step", "filter", "fault", "sort", "way", "measure", "bound", "a", "b"]) control[name].addEventListener("change", () => listEpisodes());
  for (const name of ["find", "limit"]) control[name].addEventListener("input", () => listEpisodes());
  byId("step-back").addEventListener("click", () => move(-1));
  byId("step-on").addEventListener("click", () => move(1));
  window.addEventListener("hashchange", follow);
  // the address does not change when the same link is followed again
  byId("reward-details").addEventListener("click", (event) => { if (event.target.closest("a")?.hash === location.hash) follow(); });
  listPlaces();
  follow();
}
