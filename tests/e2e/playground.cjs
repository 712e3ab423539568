// Drives the page in Chromium: node playground.cjs URL KEYED_URL CHROMIUM [PICTURES SHOWN_URL]. One JSON line for each check.
"use strict";
const assert = require("node:assert/strict");
const fs = require("node:fs");
const { chromium } = require("playwright-core");

const [url, keyedUrl, executablePath, pictures, shownUrl] = process.argv.slice(2);
const ARSENAL = "What is the total number of wins when the team is Arsenal?";
const LOGS = "Find all .log files larger than 10 megabytes in /var";
const complaints = [];
let browser;

async function open(options = {}, address = url) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 860 }, colorScheme: "light", locale: "en-GB", ...options });
  const page = await context.newPage();
  page.sent = [];
  page.on("console", message => ["error", "warning"].includes(message.type()) && complaints.push(message.text()));
  page.on("pageerror", error => complaints.push(error.stack));
  page.on("request", request => {
    if (!request.url().startsWith(address) && !/^(data|blob):/.test(request.url())) complaints.push(`asked for ${request.url()}`);
    if (request.url().endsWith("/v1/chat/completions")) page.sent.push(request.postDataJSON());
  });
  page.on("dialog", dialog => dialog.accept());
  await page.goto(address);
  if (address !== keyedUrl) await page.waitForSelector(".examples button");
  return page;
}

async function idle(page) { await page.waitForSelector("#send[aria-label=Send]"); }

async function ask(page, text) {
  await page.fill("#prompt", text);
  await page.press("#prompt", "Enter");
  await idle(page);
}

async function set(page, values) {
  if (!await page.isVisible("#settings")) await page.click("#open-settings");
  for (const [name, value] of Object.entries(values)) {
    if (["strategy", "explain", "theme"].includes(name)) await page.selectOption("#" + name, value); else await page.fill("#" + name, value);
  }
  await page.click("[data-close=panel]");
}

const texts = (page, selector) => page.locator(selector).allTextContents();
const api = async (path, body) => (await fetch(url + path.slice(1), body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) })).json();
const said = body => body.split("\n\n").filter(event => event.startsWith("data: {")).map(event => JSON.parse(event.slice(6)));

// A stream that a model might send; what the page makes of hostile text cannot be asked of a real model.
const streamOf = text => [
  { choices: [{ index: 0, delta: { role: "assistant", content: "" }, finish_reason: null }], loramux: { route: { strategy: "named", experts: [], fallback: false, truncated: false }, blend: { key: "", method: "exact", rank: 0, relative_error: 0, cached: true } } },
  ...text.match(/[\s\S]{1,7}/g).map(part => ({ choices: [{ index: 0, delta: { content: part }, finish_reason: null }] })),
  { choices: [{ index: 0, delta: {}, finish_reason: "stop" }], usage: { prompt_tokens: 3, completion_tokens: 9, total_tokens: 12 } },
].map(event => `data: ${JSON.stringify(event)}\n\n`).join("") + "data: [DONE]\n\n";

async function answering(text) {
  const page = await open();
  await page.route("**/v1/chat/completions", route => route.fulfill({ status: 200, contentType: "text/event-stream", body: streamOf(text) }));
  await ask(page, "Say it");
  return page;
}

// Contrast of every visible text with what lies behind it, composed from opaque backgrounds.
const lowContrast = () => {
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = colour => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); return [...pen.getImageData(0, 0, 1, 1).data]; };
  const over = (top, under) => top.slice(0, 3).map((value, place) => value * top[3] / 255 + under[place] * (1 - top[3] / 255));
  const light = colour => { const [r, g, b] = colour.slice(0, 3).map(value => { const part = value / 255; return part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
  const found = [];
  const check = (node, colour, what) => {
    const stack = [];
    for (let one = node; one; one = one.parentElement) stack.unshift(rgba(getComputedStyle(one).backgroundColor));
    const behind = stack.reduce((under, top) => over(top, under), [255, 255, 255]);
    const [a, b] = [light(over(rgba(colour), behind)), light(behind)], ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push(`${what}: ${ratio.toFixed(2)}`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || node.closest("script, style, option, .unseen, .skip") || !node.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    const style = getComputedStyle(node);
    check(node, node.closest("svg") ? style.fill : style.color, walker.currentNode.textContent.trim().slice(0, 30));
    count++;
  }
  for (const field of document.querySelectorAll("input, textarea")) if (field.checkVisibility()) check(field, getComputedStyle(field, "::placeholder").color, "placeholder of " + field.id);
  return { found, count };
};

const unnamed = () => [...document.querySelectorAll("button, input, select, textarea, a, dialog, [role=region], [role=img]")].filter(node => {
  const by = (node.getAttribute("aria-labelledby") ?? "").split(" ").map(key => document.getElementById(key)?.textContent ?? "").join("");
  return !(node.getAttribute("aria-label") || by || [...(node.labels ?? [])].map(label => label.textContent.trim()).join("") || (/^(BUTTON|A)$/.test(node.tagName) && node.textContent.trim()));
}).map(node => node.outerHTML.slice(0, 90));

async function everyView(page, visit) {
  await ask(page, ARSENAL);
  await visit("chat");
  await page.locator("[aria-label='Why these experts']").last().click(); await visit("why"); await page.press("#panel", "Escape");
  await page.selectOption("#model", "own mixture"); await visit("mixture"); await page.press("#panel", "Escape");
  await page.locator("[aria-label='As curl or Python']").last().click(); await visit("code"); await page.press("#code", "Escape");
  for (const where of ["compare", "experts", "decisions"]) {
    await page.evaluate(hash => { location.hash = hash; }, where);
    await page.waitForSelector(`#view-${where}:not([hidden])`);
    await visit(where);
  }
}

const checks = {
  async "the page loads with examples, a focused prompt and no complaint"() {
    const page = await open();
    const { data } = await api("/v1/experts");
    const examples = await texts(page, ".examples button > span:first-child");
    assert.equal(examples.length, 6);
    assert.ok(examples.every(text => data.some(one => one.examples.includes(text))));
    assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
    await page.locator(".examples button", { hasText: "card payment" }).click();
    await idle(page);
    assert.match(await page.textContent(".mix"), /card-transfer/);
  },

  async "Enter sends, Shift+Enter does not, and the answer has its experts, numbers and an announcement"() {
    const page = await open();
    await page.focus("#prompt");
    await page.keyboard.type("Find all files");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("larger than 10 megabytes in /var");
    assert.equal(page.sent.length, 0);
    await page.keyboard.press("Enter");
    await idle(page);
    assert.equal(page.sent[0].messages[0].content, "Find all files\nlarger than 10 megabytes in /var");
    assert.equal(page.sent[0].model, "auto");
    assert.match(await page.textContent(".mix"), /files-find/);
    assert.match(await page.textContent(".stats"), /^\d+ tokens? · .*a second · first after \d/);
    assert.match(await page.textContent("#gauge"), /^\d+ of 2,048 tokens of context/);
    assert.match(await page.textContent("#status"), /^Answer by files-find/);
    assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
    assert.equal(await page.inputValue("#prompt"), "");
  },

  async "a chat has a history, and lasts over a reload"() {
    const page = await open();
    await ask(page, ARSENAL);
    const first = await page.locator(".md").innerText();
    await ask(page, LOGS);
    assert.deepEqual(page.sent[1].messages.map(one => one.role), ["user", "assistant", "user"]);
    assert.equal(page.sent[1].messages[0].content, ARSENAL);
    await page.reload();
    await page.waitForSelector(".msg");
    assert.deepEqual(await texts(page, ".said"), [ARSENAL, LOGS]);
    assert.equal(await page.locator(".md").first().innerText(), first);
    await page.click("#new");
    assert.equal(await page.locator(".msg").count(), 0);
    await page.locator("#chats .open").first().click();
    assert.deepEqual(await texts(page, ".said"), [ARSENAL, LOGS]);
  },

  async "an edit and another try keep what was there"() {
    const page = await open();
    await ask(page, ARSENAL);
    await page.locator("[aria-label='Answer again']").click();
    await idle(page);
    assert.match(await page.locator(".msg:not(.user) .tools").innerText(), /2\/2/);
    await page.locator("[aria-label='Earlier version']").click();
    assert.match(await page.locator(".msg:not(.user) .tools").innerText(), /1\/2/);
    await page.hover(".msg.user");
    await page.locator("[aria-label='Edit and send again']").click();
    await page.fill("[aria-label='Edited message']", LOGS);
    await page.press("[aria-label='Edited message']", "Enter");
    await idle(page);
    assert.deepEqual(await texts(page, ".said"), [LOGS]);
    assert.deepEqual(page.sent.at(-1).messages.map(one => one.content), [LOGS]);
    await page.locator(".user [aria-label='Earlier version']").click();
    assert.deepEqual(await texts(page, ".said"), [ARSENAL]);
  },

  async "Stop stops, and keeps what was said"() {
    const page = await open();
    await page.route("**/v1/chat/completions", route => route.continue({ postData: JSON.stringify({ ...route.request().postDataJSON(), ignore_eos: true, max_tokens: 1900 }) }));
    await page.fill("#prompt", ARSENAL);
    await page.press("#prompt", "Enter");
    await page.waitForFunction(() => document.querySelector(".md")?.textContent.length > 20);
    await page.click("#send");
    await idle(page);
    assert.match(await page.textContent(".stats"), /stopped$/);
    assert.ok((await page.textContent(".md")).length > 20);
    await page.waitForFunction(async () => /loramux_requests_running\S* 0\.0/.test(await (await fetch("/metrics")).text()));
  },

  async "the panel shows the decision that the server gives"() {
    const page = await open();
    await ask(page, LOGS);
    const decision = await api("/v1/route", { input: LOGS, map: true });
    await page.locator("[aria-label='Why these experts']").click();
    const best = decision.candidates[0];
    assert.match(await page.textContent("#why .why"), new RegExp(`^${best.id} answers.*${best.score.toFixed(2)}.*${decision.threshold.toFixed(2)}.*${decision.margin.toFixed(2)}`));
    const rows = await texts(page, "#why .bars li");
    assert.equal(rows.length, decision.candidates.length);
    decision.candidates.forEach((one, place) => assert.ok(rows[place].includes(one.id) && rows[place].includes(`similarity ${one.similarity.toFixed(2).replace("-", "−")} · probability ${one.probability.toFixed(2)}`), rows[place]));
    assert.equal(await page.locator("#why .point").count(), decision.map.experts.length);
    assert.equal(await page.locator("#why .here").count(), 1);
    await page.press("#panel", "Escape");
    assert.match(await page.evaluate(() => document.activeElement.getAttribute("aria-label")), /Why/);
    await ask(page, "zzz qqq");
    await page.locator("[aria-label='Why these experts']").last().click();
    assert.match(await page.textContent("#why .why"), /base answers alone\.$/);
    assert.match(await page.locator(".mix").last().innerText(), /fallback/);
  },

  async "settings are sent, kept, and empty ones left out"() {
    const page = await open();
    await set(page, { temperature: "0", top_p: "0.9", max_tokens: "7", seed: "5", system: "Be short.", strategy: "similarity", top_m: "2", threshold: "0.1" });
    await ask(page, LOGS);
    const { messages, model, stream, stream_options, ...rest } = page.sent[0];
    assert.deepEqual(rest, { temperature: 0, top_p: 0.9, max_tokens: 7, seed: 5, routing: { strategy: "similarity", top_m: 2, threshold: 0.1 } });
    assert.deepEqual(messages[0], { role: "system", content: "Be short." });
    await page.reload();
    await set(page, { temperature: "", top_p: "", max_tokens: "9", seed: "", system: "", strategy: "", top_m: "", threshold: "" });
    await page.click("#new");
    await ask(page, LOGS);
    assert.deepEqual(Object.keys(page.sent[1]).sort(), ["max_tokens", "messages", "model", "stream", "stream_options"]);
  },

  async "what routing gained is said when it is asked for"() {
    const page = await open();
    await set(page, { explain: "yes", max_tokens: "3" });
    await ask(page, LOGS);
    assert.deepEqual(page.sent[0].routing, { explain: true });
    await page.locator("[aria-label='Why these experts']").last().click();
    const body = { model: "auto", messages: page.sent[0].messages, max_tokens: 3, routing: { explain: true } };
    const { explain } = (await api("/v1/chat/completions", body)).loramux;
    const told = (await page.innerText("#why")).replaceAll("−", "-");
    for (const part of ["What routing gained", `${explain.tokens} tokens`, explain.base.loss.toFixed(3), explain.blend.loss.toFixed(3), `${explain.top1.expert} alone`]) assert.ok(told.includes(part), `${part} is not in ${told}`);
  },

  async "a strategy that asks the experts says so"() {
    const page = await open();
    for (const [strategy, lead] of [["logo", /weighed by how strongly/], ["spectr", /Every token chose/]]) {
      await set(page, { strategy, max_tokens: "3" });
      await ask(page, LOGS);
      assert.equal(page.sent.at(-1).routing.strategy, strategy);
      await page.locator("[aria-label='Why these experts']").last().click();
      assert.match(await page.textContent("#why .why"), lead);
      assert.match(await page.textContent("#why"), /What the router would have done/);
      await page.press("#panel", "Escape");
    }
  },

  async "an own mixture is sent as it is set"() {
    const page = await open();
    await page.selectOption("#model", "own mixture");
    await page.fill("[aria-label='Share of select-table, exact']", "0.7");
    await page.focus("#share-files-find");
    for (let n = 0; n < 4; n++) await page.keyboard.press("ArrowRight");
    await page.press("#panel", "Escape");
    await ask(page, ARSENAL);
    assert.deepEqual(page.sent[0].lora.map(one => [one.id, Math.round(one.scale * 100) / 100]).sort(), [["files-find", .2], ["select-table", .7]]);
    assert.match((await page.textContent(".mix")).replace(/\s+/g, " "), /select-table ?0\.70.*files-find ?0\.20|files-find ?0\.20.*select-table ?0\.70/);
    await page.locator("[aria-label='Why these experts']").click();
    assert.match(await page.textContent("#why"), /You gave this mixture.*What the router would have done.*select-table/s);
  },

  async "compare asks three at once with one seed"() {
    const page = await open();
    await page.click("#side a[href='#compare']");
    await page.fill("#compare-prompt", ARSENAL);
    await page.press("#compare-prompt", "Enter");
    await page.waitForFunction(() => document.querySelectorAll("#columns .tools [aria-label='As curl or Python']").length === 3);
    await page.waitForSelector("#compare-send[aria-label=Compare]");
    const { base } = await api("/v1/experts");
    assert.deepEqual(page.sent.map(one => one.model).slice(0, 2).sort(), ["auto", base].sort());
    assert.equal(new Set(page.sent.map(one => one.seed)).size, 1);
    assert.equal((await texts(page, "#columns .md")).filter(text => text.trim()).length, 3);
    await page.click("#side a[href='#decisions']");
    assert.equal(await page.locator("#decisions tbody tr").count(), 3);
  },

  async "the experts have their numbers, can be sorted and tried"() {
    const page = await open();
    const { data } = await api("/v1/experts");
    await page.click("#side a[href='#experts']");
    const rows = await texts(page, "#experts-table tbody tr");
    assert.equal(rows.length, data.length);
    const gains = [...data].map(one => ({ ...one, worth: 1 - one.expert_loss / one.base_loss })).sort((a, b) => b.worth - a.worth);
    gains.forEach((one, place) => assert.ok(rows[place].includes(one.id) && rows[place].includes((one.worth * 100).toFixed(1) + " %") && rows[place].includes(one.rows.toLocaleString("en")), rows[place]));
    await page.click("#sort-id");
    assert.equal(await page.getAttribute("#experts-table th[aria-sort]", "aria-sort"), "ascending");
    assert.ok((await texts(page, "#experts-table tbody tr"))[0].startsWith(data[0].id));
    assert.equal(await page.evaluate(() => document.activeElement.id), "sort-id");
    assert.equal(await page.locator("#experts-map .here").count(), 0);
    await page.fill("#probe", LOGS);
    await page.waitForSelector("#experts-map .here");
    assert.match(await page.textContent("#probe-result"), /^files-find answers/);
    assert.equal(page.sent.length, 0);
    await page.click("[aria-label='Chat with true-false']");
    await ask(page, "Titanic is a film");
    assert.equal(page.sent[0].model, "true-false");
  },

  async "what was sent comes as curl and as Python"() {
    const page = await open();
    await set(page, { temperature: "0", max_tokens: "12" });
    await ask(page, "What's the total when the \"team\" is \\Arsenal?\nTell me: é, 你好");
    await page.locator("[aria-label='As curl or Python']").click();
    const [curl, python] = await texts(page, "#code-body pre");
    return { curl, python, answer: said(await (await fetch(url + "v1/chat/completions", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(page.sent[0]) })).text()).map(event => event.choices[0]?.delta.content ?? "").join("") };
  },

  async "text of a model is never markup"() {
    const page = await answering(`# Title\n\nHello <img src=x onerror="window.hit=1"> <script>window.hit=1</script> **bold <b>x</b>** [bad](javascript:window.hit=1) [data](data:text/html,x) [good](https://example.org/a_b_c) ![pic](https://example.org/x.png)\n\n<iframe src="https://example.org"></iframe>`);
    assert.equal(await page.locator(".md :is(img, script, iframe, b, style, form)").count(), 0);
    assert.deepEqual(await page.locator(".md a").evaluateAll(links => links.map(one => [one.href, one.rel])), [["https://example.org/a_b_c", "noopener noreferrer"], ["https://example.org/x.png", "noopener noreferrer"], ["https://example.org/", "noopener noreferrer"]]);
    assert.match(await page.textContent(".md"), /<img src=x onerror="window.hit=1"> <script>/);
    assert.equal(await page.evaluate(() => window.hit), undefined);
    assert.equal(await page.evaluate(() => { try { document.createElement("p").innerHTML = "<b>x</b>"; return "taken"; } catch (error) { return error.name; } }), "TypeError");
    complaints.splice(0, complaints.length, ...complaints.filter(text => !text.includes("TrustedHTML")));
  },

  async "Markdown becomes what it says"() {
    const page = await answering("## Steps\n\n1. one *soft* and `co_de`\n2. two\n   - inner __loud__\n   - ~~gone~~\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> quoted\n> more\n\n```python\ndef f(x):\n    return \"<b>\" * x\n```\n\nsnake_case_name, 2 * 3 * 4, C:\\\\x, **open\nline two https://example.org/x.\n\n---");
    const html = await page.locator(".md").first().evaluate(node => node.innerHTML);
    assert.match(html, /<h3>Steps<\/h3>/);
    assert.match(html, /<ol start="1"><li>one <em>soft<\/em> and <code>co_de<\/code><\/li><li>(<span>)?two(<\/span>)?<ul><li>inner <strong>loud<\/strong><\/li><li><s>gone<\/s><\/li><\/ul><\/li><\/ol>/);
    assert.match(html, /<th>a<\/th><th>b<\/th>.*<td>1<\/td><td>2<\/td>/);
    assert.match(html, /<blockquote><p>quoted<br>more<\/p><\/blockquote>/);
    assert.match(html, /<p>snake_case_name, 2 \* 3 \* 4, C:\\x, \*\*open<br>line two <a [^>]*>https:\/\/example.org\/x<\/a>\.<\/p><hr>$/);
    assert.equal(await page.textContent(".code code"), "def f(x):\n    return \"<b>\" * x");
    await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
    await page.click(".code button");
    assert.equal(await page.evaluate(() => navigator.clipboard.readText()), "def f(x):\n    return \"<b>\" * x");
    assert.equal(await page.textContent(".code button"), "Copied");
  },

  async "odd and long text neither hangs nor breaks the page"() {
    const page = await open();
    const hard = ["**a ".repeat(20000), "> ".repeat(5000) + "x", "[".repeat(20000), "`".repeat(9999) + "a", "- ".repeat(3000) + "x", "  ".repeat(5000) + "- x\n", "|".repeat(9000) + "\n|-|\n", "_a".repeat(20000), "* * ".repeat(9000) + "x", "[a](b".repeat(9000), "~".repeat(9999), "1. ".repeat(2000), "http://".repeat(5000), "\n>".repeat(3000), "\n- ".repeat(3000), "~~a ".repeat(9000), "``a".repeat(9000)];
    const took = await page.evaluate(texts => texts.map(text => { const start = performance.now(), node = document.createElement("div"); renderMarkdown(node, text); return [text.slice(0, 8), performance.now() - start, node.textContent.length]; }), hard);
    assert.deepEqual(took.filter(([, ms]) => ms > 3000), []);
  },

  async "an error of the server is said in words and aloud"() {
    const page = await open();
    await page.route("**/v1/chat/completions", route => route.continue({ postData: JSON.stringify({ ...route.request().postDataJSON(), model: "nobody" }) }));
    await ask(page, LOGS);
    assert.match(await page.textContent("#alert"), /nobody/);
    assert.equal(await page.getAttribute("#alert", "role"), "alert");
    assert.match(await page.textContent(".failed"), /nobody/);
    await page.click("#alert [aria-label=Dismiss]");
    assert.equal(await page.textContent("#alert"), "");
    assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
    await page.unroute("**/v1/chat/completions");
    await page.route("**/v1/chat/completions", route => route.abort());
    await ask(page, LOGS);
    assert.match(await page.textContent("#alert"), /did not answer/);
    complaints.splice(0, complaints.length, ...complaints.filter(text => !/404|ERR_FAILED/.test(text)));
  },

  async "chats go out, are deleted, and come back"() {
    const page = await open();
    await ask(page, ARSENAL);
    await page.click("#open-settings");
    const [download] = await Promise.all([page.waitForEvent("download"), page.click("#export")]);
    const file = await download.path();
    const content = JSON.parse(fs.readFileSync(file, "utf8"));
    assert.equal(content.chats.length, 1);
    await page.click("#wipe");
    assert.equal(await page.locator("#chats li").count(), 0);
    assert.equal(await page.evaluate(() => Object.keys(localStorage).filter(key => key.includes("chat.")).length), 0);
    await page.setInputFiles("#file", file);
    await page.waitForSelector("#chats li");
    await page.click("#chats .open");
    assert.deepEqual(await texts(page, ".said"), [ARSENAL]);
    for (const bad of ["{}", "no", JSON.stringify({ ...content, chats: [{ ...content.chats[0], leaf: "gone" }] }), JSON.stringify({ ...content, chats: [{ id: "x", title: "x", at: 1, leaf: "a", nodes: { a: { id: "a", role: "user", text: "x", made_at: 1, parent: "a" } } }] })]) {
      await page.setInputFiles("#file", { name: "bad.json", mimeType: "application/json", buffer: Buffer.from(bad) });
      await page.waitForFunction(() => document.querySelector("#alert").textContent.includes("bad.json is no export"));
      await page.click("#alert [aria-label=Dismiss]");
    }
    await page.hover("#chats li");
    await page.click("#chats [aria-label^=Delete]");
    assert.equal(await page.locator("#chats li").count(), 0);
  },

  async "where keys are set the page asks for one and keeps it for the tab"() {
    const page = await open({}, keyedUrl);
    await page.waitForFunction(() => document.activeElement.id === "key");
    assert.match(await page.textContent("#alert"), /key/);
    await page.fill("#key", "wrong"); await page.press("#key", "Tab");
    await page.waitForFunction(() => document.querySelector("#key-error").textContent.includes("not valid"));
    await page.fill("#key", "right-key"); await page.press("#key", "Tab");
    await page.waitForFunction(() => document.querySelector("#model").options.length > 2);
    assert.equal(await page.textContent("#alert"), "");
    await page.press("#panel", "Escape");
    await ask(page, "hello math");
    assert.match(await page.textContent(".md"), /Hello/);
    assert.equal(await page.evaluate(() => JSON.stringify(localStorage).includes("right-key")), false);
    await page.locator("[aria-label='As curl or Python']").click();
    assert.ok(!(await page.textContent("#code")).includes("right-key"));
    assert.match(await page.textContent("#code"), /\$LORAMUX_API_KEY/);
    await page.reload();
    await page.waitForFunction(() => document.querySelector("#model").options.length > 2);
    complaints.splice(0, complaints.length, ...complaints.filter(text => !text.includes("401")));
  },

  async "at 320 and 360 pixels everything is there and reachable by keyboard"() {
    for (const width of [320, 360]) {
      const page = await open({ viewport: { width, height: 640 } });
      const edge = await page.evaluate(() => {
        const example = document.querySelector(".examples button");
        example.append("answer1/answer2/answer3/answer4/answer5");
        return example.getBoundingClientRect().right;
      });
      assert.ok(edge <= width - 12, `a long word widens the example to ${edge}`);
      await page.focus("#menu"); await page.keyboard.press("Enter");
      assert.equal(await page.evaluate(() => document.activeElement.id), "new");
      await page.keyboard.press("Escape");
      assert.equal(await page.evaluate(() => document.activeElement.id), "menu");
      await everyView(page, async where => {
        await page.waitForTimeout(60);
        const wide = await page.evaluate(() => [document.documentElement.scrollWidth, ...[...document.querySelectorAll(".scroll, .dialog-body")].filter(one => one.checkVisibility()).map(one => one.scrollWidth - one.clientWidth + innerWidth)]);
        assert.ok(wide.every(one => one <= width), `${where}: ${wide}`);
        const out = await page.evaluate(() => [...document.querySelectorAll("button, input, select, textarea")].filter(one => one.checkVisibility({ visibilityProperty: true }) && !one.closest("pre")).map(one => [one.id || one.getAttribute("aria-label") || one.textContent, one.getBoundingClientRect()]).filter(([, box]) => box.right > innerWidth + 1 || box.left < -1 || box.height < 24 || box.width < 24).map(([name, box]) => `${name} ${JSON.stringify(box)}`));
        assert.deepEqual(out, [], where);
      });
      await page.context().close();
    }
  },

  async "contrast is 4.5 and everything has a name, in both themes"() {
    for (const colorScheme of ["light", "dark"]) {
      const page = await open({ colorScheme });
      await everyView(page, async where => {
        const { found, count } = await page.evaluate(lowContrast);
        assert.deepEqual(found, [], `${colorScheme} ${where}`);
        assert.ok(count > 5);
        assert.deepEqual(await page.evaluate(unnamed), [], where);
      });
      await page.context().close();
    }
    const page = await open({ colorScheme: "dark" });
    await set(page, { theme: "light" });
    assert.equal(await page.evaluate(() => getComputedStyle(document.body).backgroundColor), "rgb(252, 251, 249)");
  },
};

async function takePictures() {
  for (const [name, viewport, colorScheme, steps] of [
    ["chat-light", { width: 1280, height: 800 }, "light", async page => { await ask(page, ARSENAL); await ask(page, "Why was my card payment declined?"); await page.locator("[aria-label='Why these experts']").last().click(); }],
    ["compare-dark", { width: 1280, height: 620 }, "dark", async page => { await page.click("#side a[href='#compare']"); await page.fill("#compare-prompt", ARSENAL); await page.press("#compare-prompt", "Enter"); await page.waitForTimeout(300); await page.waitForSelector("#compare-send[aria-label=Compare]"); }],
    ["experts-light", { width: 1280, height: 900 }, "light", async page => { await page.click("#side a[href='#experts']"); await page.fill("#probe", "What is the punishment for theft under the penal code?"); await page.waitForSelector("#experts-map .here"); }],
    ["chat-narrow-dark", { width: 360, height: 740 }, "dark", async page => { await ask(page, ARSENAL); await ask(page, "Count the lines of all .py files in the current directory"); }],
  ]) {
    const page = await open({ viewport, colorScheme }, shownUrl);
    await set(page, { temperature: "0" });
    await steps(page);
    await page.mouse.move(0, 0); await page.waitForTimeout(400);
    await page.screenshot({ path: `${pictures}/${name}.png` });
    await page.context().close();
  }
}

(async () => {
  browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  try {
    for (const [name, check] of Object.entries(checks)) {
      if (process.env.ONLY && !name.includes(process.env.ONLY)) continue;
      complaints.length = 0;
      let problem = null, found = null;
      const contexts = browser.contexts().length;
      try { found = await check() ?? null; assert.deepEqual(complaints, []); } catch (error) { problem = error.stack ?? String(error); }
      for (const context of browser.contexts().slice(contexts)) await context.close();
      console.log(JSON.stringify({ name, problem, found }));
    }
    if (pictures) await takePictures();
  } finally { await browser.close(); }
})();
