
// ---- which curves runs have

// A series is [metric name, label]; `place` is the element it goes to, `share` fixes the axis to 0..100 %, `zero` starts it at 0, and
// `join` draws over
// steps at which a series has no value, `parts` says that the later series make up the first, so those that are always 0 are left out; `some` leaves out any such.
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

/** Names X of the training metrics that are called `before`X`after`. */
const named = (metrics, before, after = "") => [...new Set(metrics.train.flatMap(([, values]) => Object.keys(values)))]
  .filter((key) => key.startsWith(before) && key.endsWith(after) && key.length > before.length + after.length)
  .map((key) => key.slice(before.length, key.length - after.length));

/** Charts of the rewards of one run: its dimensions, gates, parts and faults have names of their own. */
function rewardCharts(metrics) {
  const faults = named(metrics, "faults/");
  // a fault class is logged only at the steps where it occurred
  for (const [, values] of metrics.train) for (const name of faults) values[`faults/${name}`] ??= 0;
  const series = (before, after) => named(metrics, before, after).map((name) => [`${before}${name}${after}`, name]);
  const charts = [
    ...split({ title: "Reward dimensions", note: "Mean of each, before weighting.", series: series("rewards/", "/mean") }),
    ...split({ title: "Gate pass rate", note: "Share of scores at or above the gate's threshold; without a score it fails.", share: true,
      series: series("rewards/", "/pass_rate") }),
    ...split({ title: "Parts of the reward", note: "What the aggregator makes it of, mean over the episodes.", zero: true,
      series: series("reward/", "") }),
    ...split({ title: "Not measured", note: "Share of scores that are None, of dimensions that have some.", share: true, some: true,
      series: series("rewards/", "/none_share") }),
    ...split({ title: "Faults", note: "Failed measurements per step, by whose fault they are.", zero: true, some: true,
      series: series("faults/", "") }),
  ].map((spec) => ({ ...spec, place: "reward-charts" }));
  const spread = named(metrics, "rewards/", "/std").map((name) => ({ title: name, note: "The band is one standard deviation.",
    place: "reward-more-charts", series: [[`rewards/${name}/mean`, "mean"]], band: `rewards/${name}/std` }));
  return [...charts, ...spread].map((spec) => ({ ...spec, phase: "train" }));
}

/** The metrics of several runs as one: the values of run number i are called `i:NAME`. */
function merged(runs) {
  const phases = {};
  for (const phase of ["warmup", "train", "eval"]) {
    const steps = new Map();
    runs.forEach((run, i) => run.metrics[phase].forEach(([step, values]) => {
      if (!steps.has(step)) steps.set(step, {});
      for (const [name, value] of Object.entries(values)) steps.get(step)[`${i}:${name}`] = value;
    }));
    phases[phase] = [...steps].sort(([a], [b]) => a - b);
  }
  return phases;
}

/** One chart for each metric, with a line for each run; where the time goes, one chart for each run. */
function overlaid(runs) {
  const metrics = merged(runs), charts = new Map();
  for (const spec of runs.flatMap((run) => [...CHARTS, ...rewardCharts(run.metrics)])) {
    if (spec.place === "reward-more-charts") continue;
    if (spec.stack) {
      runs.forEach((run, i) => charts.set(`${spec.title}/${i}`, { ...spec, metrics, title: `${spec.title}, ${run.name}`,
        series: spec.series.map(([key, label]) => [`${i}:${key}`, label]) }));
      continue;
    }
    for (const [key, label] of spec.series) {
      const title = spec.series.length > 1 || spec.place ? `${spec.title}: ${label}` : spec.title;
      charts.set(`${spec.phase}/${key}`, { ...spec, metrics, title, band: undefined, parts: false, some: spec.some || spec.parts, join: true,
        note: (spec.note ?? "").replace("; the band is one standard deviation", ""), series: runs.map((run, i) => [`${i}:${key}`, run.name]) });
    }
  }
  return [...charts.values()].flatMap(split);
}

function showCurves() {
  const runs = data.sources.filter((source) => source.kind === "run");
  const charts = runs.length > 1 ? overlaid(runs) : runs.flatMap(({ metrics }) => [...CHARTS, ...rewardCharts(metrics)].map((spec) => ({ ...spec, metrics })));
  charts.forEach(addChart);
  if (!byId("charts").children.length) byId("charts").append(el("p", { className: "empty" }, "No metrics yet."));
  for (const name of ["more", "reward-more"]) byId(name).hidden = !byId(`${name}-charts`).children.length;
}
