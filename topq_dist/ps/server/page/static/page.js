// The status page: asks its server again and again, and shows what it last said.
"use strict";

const html = htm.bind(preact.createElement);
const { useEffect, useMemo, useRef, useState } = preactHooks;

const EVERY_MS = 1000;
const HIDDEN_EVERY_MS = 5000;
const PATIENCE_MS = 5000;
const MOST_POINTS = 4096;

// One list of versions, of all the server's processes: after a restart it may go on from before.
function joined(points, status) {
  const fresh = status.points;
  const first = fresh.length ? fresh[0][0] : status.version + 1;
  const last = points.length ? points[points.length - 1][0] : -1;
  if (!fresh.length && last < first) return points;
  const before = last >= first ? points.filter((point) => point[0] < first) : points;
  return before.concat(fresh).slice(-MOST_POINTS);
}

// the newest version that this process of the server has told of
function knownOf(before, status) {
  if (status.points.length) return status.points[status.points.length - 1][0];
  return before.status && before.status.instance === status.instance ? before.known : -1;
}

function useStatus() {
  const [seen, setSeen] = useState({ status: null, points: [], known: -1, awayMs: 0, why: "" });
  const latest = useRef(seen);
  useEffect(() => {
    let timer = 0;
    let ended = false;
    let awaySince = 0;
    let asking = false;
    async function ask() {
      asking = true;
      const before = latest.current;
      const instance = before.status ? before.status.instance : "";
      const stop = new AbortController();
      const patience = setTimeout(() => stop.abort(), PATIENCE_MS);
      try {
        const answer = await fetch(`api/status?after=${before.known}&instance=${instance}`, {
          cache: "no-store",
          signal: stop.signal,
        });
        if (!answer.ok) throw new Error(`it answers ${answer.status}`);
        const status = await answer.json();
        awaySince = 0;
        latest.current = {
          status,
          points: joined(before.points, status),
          known: knownOf(before, status),
          awayMs: 0,
          why: "",
        };
      } catch (error) {
        awaySince = awaySince || Date.now();
        latest.current = { ...before, awayMs: Math.max(1, Date.now() - awaySince), why: String(error.message || error) };
      }
      clearTimeout(patience);
      asking = false;
      if (ended) return;
      setSeen(latest.current);
      timer = setTimeout(ask, document.hidden ? HIDDEN_EVERY_MS : EVERY_MS);
    }
    function look() {
      // who is asking asks again by itself
      if (document.hidden || asking) return;
      clearTimeout(timer);
      timer = setTimeout(ask, 0);
    }
    document.addEventListener("visibilitychange", look);
    ask();
    return () => {
      ended = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", look);
    };
  }, []);
  return seen;
}

// versions a second, of the last half minute
function rateOf(points) {
  const last = points[points.length - 1];
  if (!last || points.length < 2) return null;
  const from = Math.max(last[1], Date.now() / 1000) - 30;
  const recent = points.filter((point) => point[1] >= from);
  if (recent.length < 2) return recent.length / 30;
  const took = Math.max(Date.now() / 1000, last[1]) - recent[0][1];
  return took > 0 ? (recent.length - 1) / took : null;
}

function median(values) {
  const sorted = values.filter(format.known).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}

function times(dense, sent) {
  return sent > 0 && dense > 0 ? `${format.number(dense / sent)} ×` : "–";
}

const Tile = ({ name, value, note }) => html`
  <div class="tile"><dt>${name}</dt><dd>${value}<small>${note}</small></dd></div>`;

function Tiles({ status, points }) {
  const rate = rateOf(points);
  const live = status.workers.filter((one) => one.lease_left_s > 0).length;
  const waiting = status.workers.filter((one) => one.waiting).length;
  const saved = status.received_dense_bytes + status.sent_dense_bytes - status.received_bytes - status.sent_bytes;
  const refused = Object.values(status.refused).reduce((a, b) => a + b, 0);
  const round = median(points.slice(-101).map((point) => point[2]));
  const unsaved = status.version - status.durable_version;
  return html`<dl class="tiles">
    <${Tile} name="Version" value=${format.whole(status.version)}
      note=${`${rate === null ? "–" : format.number(rate)} a second`} />
    <${Tile} name="Durable" value=${format.whole(status.durable_version)}
      note=${status.snapshot_overdue_s > 60
        ? `a snapshot is overdue by ${format.seconds(status.snapshot_overdue_s)}`
        : `${format.whole(unsaved)} in no snapshot yet`} />
    <${Tile} name="Workers" value=${`${live} of ${status.workers.length}`}
      note=${status.round_workers ? `${waiting} of ${status.round_workers} pushes are there` : "each push is a version"} />
    <${Tile} name="Bytes saved" value=${format.bytes(Math.max(0, saved))}
      note=${`${times(status.received_dense_bytes, status.received_bytes)} fewer up, ${times(status.sent_dense_bytes, status.sent_bytes)} down`} />
    <${Tile} name="Round" value=${format.seconds(round)}
      note=${`median; ${format.whole(status.slow_rounds)} were slow`} />
    <${Tile} name="Refused" value=${format.whole(refused)}
      note=${Object.entries(status.refused).map(([reason, count]) => `${reason} ${count}`).join(", ") || "nothing"} />
  </dl>`;
}

const COLUMNS = [
  ["worker", "Worker", (one) => one.worker],
  ["state", "State", null],
  ["version", "Version", (one) => format.whole(one.version)],
  ["lag", "Lag", (one) => format.whole(one.lag)],
  ["lease_left_s", "Lease", (one) => (one.lease_left_s > 0 ? format.seconds(one.lease_left_s) : "over")],
  ["waited_s", "Waited", (one) => format.seconds(one.waited_s)],
  ["late", "Late", (one) => format.whole(one.late)],
  ["received_bytes", "Up", (one) => format.bytes(one.received_bytes)],
  ["sent_bytes", "Down", (one) => format.bytes(one.sent_bytes)],
  ["loss", "Loss", (one) => format.number(one.loss)],
  ["residual_ratio", "Residual", (one) => format.number(one.residual_ratio)],
  ["oldest_unsent_steps", "Oldest unsent", (one) => format.whole(one.oldest_unsent_steps)],
];

function stateOf(one) {
  if (one.lease_left_s <= 0) return "gone";
  if (one.late_in_a_row > 1) return "late";
  return one.waiting ? "waits" : "computes";
}

function Workers({ workers }) {
  const [by, setBy] = useState({ key: "worker", down: false });
  const valueOf = (one) => (by.key === "state" ? stateOf(one) : one[by.key]);
  const rows = [...workers].sort((a, b) => {
    const [left, right] = [valueOf(a), valueOf(b)];
    const order = typeof left === "string" && typeof right === "string"
      ? left.localeCompare(right, "en", { numeric: true })
      : (left ?? -Infinity) - (right ?? -Infinity);
    return (by.down ? -order : order) || a.worker.localeCompare(b.worker, "en", { numeric: true });
  });
  const sort = (key) => setBy({ key, down: by.key === key ? !by.down : key !== "worker" });
  if (!rows.length) return html`<p class="note" id="workers">No worker has joined yet.</p>`;
  return html`<div class="scroll"><table id="workers" tabindex="-1">
    <caption>Workers</caption>
    <thead><tr>${COLUMNS.map(([key, title]) => html`
      <th key=${key} scope="col" aria-sort=${by.key === key ? (by.down ? "descending" : "ascending") : "none"}>
        <button type="button" onClick=${() => sort(key)}>${title}</button>
      </th>`)}</tr></thead>
    <tbody>${rows.map((one) => html`<tr key=${one.worker} class=${stateOf(one)}>
      ${COLUMNS.map(([key, title, show]) => key === "worker"
        ? html`<th key=${key} scope="row">${one.worker}</th>`
        : html`<td key=${key} data-title=${title}>${show ? show(one) : html`<span class="state">${stateOf(one)}</span>`}</td>`)}
    </tr>`)}</tbody>
  </table></div>`;
}

function Charts({ points }) {
  const columns = useMemo(() => {
    const column = (at) => points.map((point) => point[at]);
    return { versions: column(0), round: column(2), up: column(4), loss: column(5), residual: column(6) };
  }, [points]);
  const { versions } = columns;
  return html`<section class="charts" aria-label="Charts over versions">
    <${Chart} title="Loss" note="The mean of what the workers report." versions=${versions}
      values=${columns.loss} show=${format.number} stroke="--first" />
    <${Chart} title="Bytes a step" note="Of a worker's push, on average." versions=${versions}
      values=${columns.up} show=${format.bytes} stroke="--second" calm />
    <${Chart} title="Residual norm" note="Over the gradient's: what is still to be sent." versions=${versions}
      values=${columns.residual} show=${format.number} stroke="--third" />
    <${Chart} title="Round time" note="From a version's first push until it is made." versions=${versions}
      values=${columns.round} show=${format.seconds} stroke="--fourth" />
  </section>`;
}

function Page() {
  const { status, points, awayMs, why } = useStatus();
  const state = awayMs ? "away" : status ? "live" : "asking";
  const isThere = status !== null;
  useEffect(() => {
    if (isThere) performance.measure("drawn");
  }, [isThere]);
  useEffect(() => {
    if (status) document.title = awayMs ? "away: topq" : `${status.version}: topq`;
  }, [status, awayMs]);
  return html`
    <header>
      <h1>topq</h1>
      ${status && html`<p class="run">run <code>${status.run || "not begun"}</code>, ${status.inner_opt},
        ${" "}${status.mode}, downlink ${status.downlink}, ${format.whole(status.numel)} parameters,
        up for ${format.seconds(status.uptime_s)}</p>`}
      <p class=${`pill ${state}`} role="status" title=${why}>${state === "live" ? "live"
        : state === "asking" ? "asking the server"
        : `the server is away${awayMs > 2500 ? ` for ${format.seconds(Math.round(awayMs / 1000))}` : ""}: still asking`}</p>
    </header>
    <main>
      ${status && html`<${Tiles} status=${status} points=${points} />`}
      ${status && html`<${Charts} points=${points} />`}
      ${status && html`<${Workers} workers=${status.workers} />`}
    </main>`;
}

const root = document.getElementById("page");
root.textContent = "";
preact.render(html`<${Page} />`, root);
