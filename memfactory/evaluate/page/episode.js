
// ---- one episode

const rewardText = (reward) => (reward === null ? "n/a" : show.number(reward));
const rewardClass = (reward) => (reward === null ? "none" : reward > 0 ? "good" : "bad");
const signClass = (value) => (value > 0 ? "up" : value < 0 ? "down" : "flat");

function pane(title, className, ...content) {
  const body = el("div", { className: "text" }, ...content);
  if (!body.textContent) body.replaceChildren(el("em", {}, "empty"));
  return el("div", { className: `block ${className}` }, el("h5", {}, title), body);
}

function turnCard(turn, number, episode, credited) {
  const reads = turn.chunk !== null;
  const count = new Set(episode.turns.map((other) => other.chunk).filter((chunk) => chunk !== null)).size;
  const chips = [
    el("span", { className: turn.stop === "length" ? "chip warn" : "chip" }, turn.stop === "length" ? "cut by the token limit" : "ended by itself"),
    el("span", { className: "chip" }, `${turn.prompt_tokens} → ${turn.completion_tokens} tokens`),
    !credited ? null : turn.trainable ? el("span", { className: `chip ${signClass(turn.advantage || 0)}` }, `advantage ${signed(turn.advantage || 0)}`) : el("span", { className: "chip" }, "not trained"),
  ];
  const evidence = episode.probes.flatMap((probe) => probe.evidence).filter((item) => item.chunk === turn.chunk).map((item) => item.text);
  const changed = turn.memory_before !== turn.memory_after;
  const asWritten = changed && turn.text.trim() === turn.memory_after.trim();
  const panes = [];
  if (turn.chunk_text !== null) panes.push(pane("Chunk", "chunk", highlighted(turn.chunk_text, evidence)));
  if (reads || changed) {
    const parts = difference(turn.memory_before, turn.memory_after);
    panes.push(pane("Memory before", "before", marked(parts, "del")), pane(`Memory after${asWritten ? ", as written" : changed ? "" : ", unchanged"}`, "after", marked(parts, "ins")));
  } else {
    panes.push(pane("Memory", "after", turn.memory_before));
  }
  const prompt = el("details", {}, el("summary", {}, `Full prompt, ${turn.prompt_tokens} tokens`));
  prompt.addEventListener("toggle", () => {
    if (prompt.children.length === 1) prompt.append(...turn.messages.map((message) => pane(message.role, "message", message.content)));
  });
  return el("li", { className: "turn" },
    el("header", {}, el("h4", {}, el("span", { className: "number" }, number + 1), turn.module, reads ? el("small", {}, `chunk ${turn.chunk + 1} of ${count}`) : null), el("div", { className: "chips" }, chips)),
    turn.error ? el("p", { className: "error" }, turn.error) : null,
    el("div", { className: `panes n${panes.length}` }, panes),
    asWritten ? null : pane("Text as written", "written", turn.text),
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

/** Shows the episode of `entry`; of two that are asked for in a row, the later one. */
let wanted = null;
async function showEpisode(entry) {
  const target = byId("episode");
  wanted = entry;
  if (!entry) {
    target.replaceChildren(el("p", { className: "empty" }, "No episode fits."));
    return;
  }
  const episode = await episodeOf(entry);
  if (wanted !== entry) return;
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
  const { rewards, name, kind } = data.sources[entry.source];
  const credited = kind === "run"; // an evaluation has no advantages
  const verdicts = verdictsOf(entry);
  const apart = (rewards?.disagreements ?? []).find((item) => disagreeing(item, entry.source) === entry);
  target.replaceChildren(
    ...probes,
    episode.failed ? el("p", { className: "error" }, `It could not be run to its end. ${episode.failed}`) : "",
    el("dl", { className: "episode-facts" },
      fact("Reward", el("b", { className: `pill ${rewardClass(entry.reward)}` }, rewardText(entry.reward))),
      credited ? fact("Advantage", signed(entry.advantage || 0)) : null,
      fact("Tokens", show.number(entry.tokens)),
      data.sources.length > 1 ? fact("Run", name) : null,
      entry.candidate ? fact("Candidate", `${entry.candidate}, ${entry.mode}`) : null,
      fact("Task", entry.task),
      entry.group ? fact("Group", entry.group) : null,
      entry.id ? fact("Episode", entry.id) : null,
        verdicts ? fact("Rule and judge", FILTERS.judge(entry) ? "disagree: " : "agree: ", ...scoreOf({ name: verdicts.metric, value: verdicts.rule }),
        ", ", ...scoreOf({ name: data.judge, value: verdicts.judge })) : null,
      apart ? fact("Dimensions disagree", "high: ", ...scoreOf(apart.high), ", low: ", ...scoreOf(apart.low)) : null),
    scoreTable(episode.scores) ?? "",
    el("ol", { className: "turns" }, episode.turns.map((turn, number) => turnCard(turn, number, episode, credited))));
}
