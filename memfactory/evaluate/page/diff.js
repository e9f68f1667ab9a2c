
// ---- differences of two texts

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
