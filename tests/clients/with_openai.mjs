// openai for JavaScript.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { API, ASK, check, finished, started } from "./checks.mjs";

started("openai");
const client = new OpenAI({ baseURL: API, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: ASK }];
const chat = { model: "auto", messages, max_tokens: 12, temperature: 0 };
const response = { model: "auto", input: ASK, max_output_tokens: 200, temperature: 0 };

await check("chat and history", async () => {
  const answer = await client.chat.completions.create(chat);
  assert.ok(answer.loramux.route.experts);
  const turns = [...messages, answer.choices[0].message, { role: "user", content: "Why?" }];
  assert.ok((await client.chat.completions.create({ ...chat, messages: turns })).choices[0].message);
});

await check("stream with usage", async () => {
  const stream = client.chat.completions.stream({ ...chat, stream_options: { include_usage: true } });
  const whole = await client.chat.completions.create(chat);
  assert.equal(await stream.finalContent(), whole.choices[0].message.content);
  assert.deepEqual((await stream.totalUsage()).completion_tokens, whole.usage.completion_tokens);
});

await check("responses", async () => {
  const whole = await client.responses.create(response);
  assert.ok(whole.output_text);
  const stream = client.responses.stream(response);
  assert.equal((await stream.finalResponse()).output_text, whole.output_text);
  const next = { ...response, input: [...whole.output, { role: "user", content: "Why?" }] };
  assert.equal((await client.responses.create(next)).object, "response");
});

await check("embeddings", async () => {
  const answer = await client.embeddings.create({ model: "auto", input: ["a card payment", "a film"] });
  assert.equal(answer.data.length, 2);
  assert.ok(Math.abs(answer.data[0].embedding[0]) < 1);
});

await check("models", async () => {
  const ids = (await client.models.list()).data.map((model) => model.id);
  assert.equal(ids[0], "auto");
  assert.equal((await client.models.retrieve(ids[1])).id, ids[1]);
});

await check("errors", async () => {
  const wrong = client.chat.completions.create({ ...chat, model: "nobody" });
  await assert.rejects(wrong, (error) => error.status === 404 && error.code === "model_not_found");
});

await check("abort", async () => {
  const stream = await client.chat.completions.create({ ...chat, max_tokens: 1000, ignore_eos: true, stream: true });
  for await (const _ of stream) break;
  stream.controller.abort();
});

finished();
