"use strict";
// Renders the report from the JSON in the page. Model text is inserted only as text, never as HTML.

const report = JSON.parse(document.getElementById("data").textContent);
const runs = report.runs;
const several = runs.length > 1;
const scheme = matchMedia("(prefers-color-scheme: dark)");
const LIGHT = ["#1864ab", "#b35900", "#2b7a3d", "#b3261e", "#5f3dc4", "#0b6e7f", "#a61e78", "#5c5f00"];
const DARK = ["#74b9f5", "#f5a65b", "#72d08a", "#ff8f85", "#b6a0ff", "#63d3e3", "#f28cc9", "#d3d66b"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e007f}]/gu;

// --- elements ---------------------------------------------------------------------------------------------------

function element(tag, classes, ...children) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  made.append(...children.map((child) => (typeof child === "number" ? String(child) : child)));
  return made;
}

// Escapes characters that are invisible or change the order of others.
function visible(text) {
  return text.replace(HIDDEN, (sign) => {
    const hex = sign.codePointAt(0).toString(16);
    return hex.length > 4 ? "\\U" + hex.padStart(8, "0") : "\\u" + hex.padStart(4, "0");
  });
}

function said(text) {
  return element("span", "said", visible(text));
}

function short(value) {
  return value === null || value === undefined ? "–" : Number(value.toPrecision(3)).toString();
}

function table(head, rows) {
  const line = (cells, tag) =>
    element("tr", "", ...cells.map((cell) =>
      cell instanceof Node ? element(tag, "", cell) : element(tag, typeof cell === "number" ? "number" : "", typeof cell === "number" ? short(cell) : cell)));
  return element("div", "wide", element("table", "", line(head, "th"), ...rows.map((row) => line(row, "td"))));
}

function choice(label, options, changed) {
  const select = element("select");
  for (const [value, text] of options) {
    const option = element("option", "", text);
    option.value = value;
    select.append(option);
  }
  select.addEventListener("change", changed);
  return [element("label", "", label, select), select];
}

function into(id, ...children) {
  document.getElementById(id).append(...children);
}

// --- figures ----------------------------------------------------------------------------------------------------

const drawn = [];
// No button bar, which would cover the curves: dragging zooms in, a double click resets.
const SHOWN = { displayModeBar: false, responsive: true };

// Plotly interprets some HTML in names, so it is escaped.
function plain(text) {
  return visible(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function palette() {
  return scheme.matches ? DARK : LIGHT;
}

function layout(more) {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: of("--line"), zerolinecolor: of("--line"), automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: of("--text"), size: 12 },
    margin: { l: 48, r: 8, t: 8, b: 32 }, hovermode: "x unified", showlegend: true,
    hoverlabel: { bgcolor: of("--back"), bordercolor: of("--line"), font: { color: of("--text") } },
    legend: { orientation: "h", traceorder: "normal", y: -0.22, x: 0 },
    xaxis: { ...axis, title: { text: "iteration", standoff: 4 } }, yaxis: { ...axis }, ...more,
  };
}

function alarmLines() {
  const color = getComputedStyle(document.documentElement).getPropertyValue("--bad").trim();
  const begun = runs.flatMap((run) => run.alarms.filter((alarm) => alarm.action !== "over"));
  return begun.map((alarm) => ({
    type: "line", x0: alarm.iteration, x1: alarm.iteration, yref: "paper", y0: 0, y1: 1,
    line: { color, width: 1, dash: "dot" },
  }));
}

function figure(holder, traces, more) {
  const draw = () => Plotly.react(holder, traces(), layout(more()), SHOWN);
  drawn.push(draw);
  draw();
}

function curves(metrics) {
  const colors = palette();
  return runs.flatMap((run, r) => metrics.filter((name) => name in run.metrics).map((name) => {
    const m = metrics.indexOf(name);
    return {
      x: run.metrics.iteration, y: run.metrics[name], mode: "lines", connectgaps: true,
      name: plain(several ? `${run.name}: ${name}` : name),
      line: { color: colors[(several ? r : m) % colors.length], dash: several ? DASHES[m % DASHES.length] : "solid", width: 2 },
    };
  }));
}

function chart(title, metrics) {
  const holder = element("div", "chart");
  const meanings = metrics.map((name) => element("p", "", `${name}: ${report.meanings[name]}`));
  const panel = element("div", "panel", element("h3", "", title), holder, ...meanings);
  return [panel, () => figure(holder, () => curves(metrics), () => ({ shapes: alarmLines() }))];
}

function drawCurves() {
  const grid = element("div", "grid");
  const made = report.charts.map(({ title, metrics }) => chart(title, metrics));
  grid.append(...made.map(([panel]) => panel));
  into("curves", grid);
  made.forEach(([, draw]) => draw());
  const names = Object.keys(report.meanings).filter((name) => name !== "iteration").sort();
  if (!names.length) return into("curves", element("p", "", "No iterations yet."));
  const holder = element("div", "chart"), meaning = element("p");
  const change = () => { meaning.textContent = report.meanings[select.value]; redraw(); };
  const [label, select] = choice("Any metric", names.map((name) => [name, name]), change);
  const redraw = () => Plotly.react(holder, curves([select.value]), layout({ shapes: alarmLines() }), SHOWN);
  into("curves", element("h2", "", "Any metric"), element("div", "controls", label), element("div", "panel", holder, meaning));
  drawn.push(redraw);
  change();
}

function drawTimes() {
  for (const run of runs) {
    const there = report.phases.filter((phase) => `time/${phase}` in run.metrics);
    if (!there.length) continue;
    const holder = element("div", "chart");
    into("times", element("div", "panel", element("h3", "", several ? run.name : "Seconds of each iteration, by phase"), holder,
      element("p", "", "The tooltip also gives each phase's fraction of the hardware limit, where known.")));
    const traces = () => there.map((phase, place) => ({
      type: "bar", name: phase, x: run.metrics.iteration, y: run.metrics[`time/${phase}`],
      customdata: (run.metrics[`limit/${phase}`] || run.metrics.iteration.map(() => null)).map((share) =>
        share === null || share === undefined ? "" : `, ${(100 * share).toFixed(0)} % of the limit`),
      hovertemplate: "%{y:.2f} s%{customdata}", marker: { color: palette()[place % palette().length] },
    }));
    figure(holder, traces, () => ({ barmode: "stack" }));
  }
}

// --- alarms, facts, settings ----------------------------------------------------------------------------------------

function drawFacts() {
  for (const run of runs) {
    const list = element("dl", "facts", ...run.facts.map(([name, value]) =>
      element("div", "", element("dt", "", name), element("dd", "", visible(value)))));
    into("facts", element("div", "panel", ...(several ? [element("h3", "", run.name)] : []), list));
  }
}

function drawAlarms() {
  const rows = runs.flatMap((run) => run.alarms.map((alarm) =>
    [...(several ? [run.name] : []), alarm.iteration, alarm.alarm, alarm.action, said(alarm.said)]));
  if (!rows.length) return into("alarms", element("p", "good", "None."));
  into("alarms", table([...(several ? ["run"] : []), "iteration", "alarm", "action", "message"], rows));
}

function drawSettings() {
  const names = [...new Set(runs.flatMap((run) => [...Object.keys(run.config), ...Object.keys(run.started)]))];
  const value = (run, name) => run.config[name] ?? run.started[name] ?? "–";
  const holder = element("div");
  const fill = () => {
    const shown = names.filter((name) => !several || !only.checked || new Set(runs.map((run) => value(run, name))).size > 1);
    const rows = shown.map((name) => [name, ...runs.map((run) => said(value(run, name)))]);
    holder.replaceChildren(table(["", ...runs.map((run) => run.name)], rows));
  };
  const only = element("input");
  only.type = "checkbox";
  only.addEventListener("change", fill);
  if (several) into("settings", element("div", "controls", element("label", "", only, "differences only")));
  into("settings", holder);
  fill();
}

// --- queries and answers --------------------------------------------------------------------------------------------

function shaded(tokens) {
  const spans = tokens.map(([text, logprob]) => {
    const span = element("span", "token", visible(text));
    if (logprob === null) {
      span.title = "log-probability not finite";
      return span;
    }
    // no shade at probability 1, full shade at 1/400 or less
    span.style.backgroundColor = `rgba(var(--unlikely), ${(0.75 * Math.min(-logprob / 6, 1)).toFixed(3)})`;
    span.title = `log-probability ${logprob.toFixed(3)}, probability ${Math.exp(logprob).toPrecision(3)}`;
    return span;
  });
  return element("span", "said", ...spans);
}

function answers(record) {
  const parts = Object.keys(record.answers[0]?.rewards ?? {});
  const rows = record.answers.map((answer) => [
    answer.R, answer.R_Q, answer.advantage, ...parts.map((name) => answer.rewards[name] ?? "–"),
    element("span", answer.valid ? "mark good" : "mark bad", answer.valid ? "valid" : "masked"),
    element("span", "mark", answer.stopped ? "" : "truncated"), answer.tokens ? shaded(answer.tokens) : said(answer.text),
  ]);
  return table(["R", "R_Q", "advantage", ...parts, "", "", "answer"], rows);
}

function entry(record) {
  const counted = record.answers.filter((answer) => answer.valid);
  const value = counted.length ? counted.reduce((sum, answer) => sum + answer.R, 0) / counted.length : null;
  const head = element("summary", "",
    element("span", "faint", `iteration ${record.iteration}`), said(record.query),
    element("span", record.valid ? "good" : "bad", record.valid ? "valid" : "invalid"),
    element("span", "faint", `V ${short(value)}, reward ${short(record.reward)}, advantage ${short(record.advantage)}`),
    ...(record.asked > 1 ? [element("span", "bad", `asked ${record.asked} times`)] : []));
  const details = element("details", "", head);
  details.addEventListener("toggle", () => { if (details.children.length === 1) details.append(answers(record)); });
  return details;
}

const KINDS = {
  all: ["all", () => true],
  valid: ["valid", (record) => record.valid],
  invalid: ["invalid", (record) => !record.valid],
  repeated: ["asked more than once", (record) => record.asked > 1],
  flat: ["answers with equal rewards", (record) => new Set(record.answers.filter((a) => a.valid).map((a) => a.R + a.R_Q)).size < 2],
};

function drawQueries() {
  const list = element("div"), count = element("span", "faint");
  const fill = () => {
    const run = runs[Number(which.value)], text = search.value.toLowerCase(), keeps = KINDS[kind.value][1];
    const found = run.queries.filter((record) => keeps(record) &&
      (record.query.toLowerCase().includes(text) || record.answers.some((answer) => answer.text.toLowerCase().includes(text))));
    count.textContent = `${found.length} of ${run.queries.length} shown`;
    list.replaceChildren(...found.map(entry));
    again.replaceChildren();
    if (run.repeated.length) again.append(element("h3", "", "Most frequent queries"), table(["times", "first", "last", "query"],
      run.repeated.map((item) => [item.count, item.first, item.last, said(item.query)])));
  };
  const [runLabel, which] = choice("Run", runs.map((run, place) => [String(place), run.name]), fill);
  const [kindLabel, kind] = choice("Show", Object.entries(KINDS).map(([name, [text]]) => [name, text]), fill);
  const search = element("input"), again = element("div");
  search.type = "search";
  search.placeholder = "in queries and answers";
  search.addEventListener("input", fill);
  into("queries",
    element("p", "faint", "Sample queries from iterations across the run. The answers to the first query of an iteration are shaded by token probability: likely ",
      element("span", "legend"), " unlikely."),
    element("div", "controls", ...(several ? [runLabel] : []), kindLabel, element("label", "", "Find", search), count), list, again);
  fill();
}

drawFacts();
drawAlarms();
drawCurves();
drawTimes();
drawQueries();
drawSettings();
scheme.addEventListener("change", () => drawn.forEach((draw) => draw()));
