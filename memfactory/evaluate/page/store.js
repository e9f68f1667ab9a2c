
// ---- the data of the page: an index of all episodes, and blocks that are inflated when one is opened

const data = JSON.parse(byId("data").textContent);
/** One line of the index for each episode; `scores` by dimension, null where it was not measured. */
const entries = data.index.map((line) => {
  const entry = Object.fromEntries(data.columns.map((name, k) => [name, line[k]]));
  entry.scores = Object.fromEntries(entry.scores.map((value, k) => [data.dimensions[k], value]));
  return entry;
});

const blocks = new Map();
const KEPT_BLOCKS = 8;

/** The block number `k`: {texts, episodes}. */
async function block(k) {
  if (!blocks.has(k)) {
    const packed = Uint8Array.from(atob(byId(`block-${k}`).textContent), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    blocks.set(k, await new Response(stream).json());
    if (blocks.size > KEPT_BLOCKS) blocks.delete(blocks.keys().next().value);
  }
  return blocks.get(k);
}

/** The whole episode of an entry, its texts in place. */
async function episodeOf(entry) {
  const { texts, episodes } = await block(entry.block);
  const episode = episodes[entry.place];
  const turns = episode.turns.map((turn) => ({ ...turn,
    text: texts[turn.text], memory_before: texts[turn.memory_before], memory_after: texts[turn.memory_after],
    chunk_text: turn.chunk_text === null ? null : texts[turn.chunk_text],
    retrieved: (turn.retrieved ?? []).map((item) => ({ ...item, text: texts[item.text] })),
    messages: (turn.messages ?? []).map((message) => ({ role: message.role, content: message.content.map((k) => texts[k]).join("") })) }));
  return { ...episode, turns };
}

/** The address of an episode on this page. */
const hashOf = (entry) => `#episode/${[...(data.sources.length > 1 ? [entry.source] : []), entry.split, entry.step, ...(entry.candidate ? [entry.candidate, entry.mode, entry.sample] : []), entry.id].map(encodeURIComponent).join("/")}`;
