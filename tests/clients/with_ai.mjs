// The AI SDK, over chats and over Responses.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateText, streamText } from "ai";
import { API, ASK, check, finished, started } from "./checks.mjs";

started("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai");
const loramux = createOpenAICompatible({ name: "loramux", baseURL: API, includeUsage: true });
const openai = createOpenAI({ baseURL: API, apiKey: "none" });
// Unless it is told that nothing is stored, it refers to earlier answers by their ids.
const providerOptions = { openai: { store: false } };
const settings = { prompt: ASK, maxOutputTokens: 12, temperature: 0, maxRetries: 0, providerOptions };
const models = { chats: loramux("auto"), responses: openai.responses("auto"), "openai's chats": openai.chat("auto") };

for (const [name, model] of Object.entries(models)) {
  await check(`text over ${name}`, async () => {
    const answer = await generateText({ model, ...settings, system: "Be short." });
    assert.ok(answer.text);
    assert.ok(answer.usage.outputTokens <= 12);
  });
  await check(`stream over ${name}`, async () => {
    const result = streamText({ model, ...settings });
    let text = "";
    for await (const part of result.textStream) text += part;
    assert.equal(text, (await generateText({ model, ...settings })).text);
    assert.ok((await result.usage).outputTokens > 0);
  });
  await check(`history over ${name}`, async () => {
    const { response } = await generateText({ model, ...settings });
    const { prompt, ...rest } = settings;
    const ask = { role: "user", content: ASK };
    const messages = [ask, ...response.messages, { role: "user", content: "Why?" }];
    assert.equal(typeof (await generateText({ model, ...rest, messages })).text, "string");
  });
}

await check("completions", async () => {
  assert.ok((await generateText({ model: loramux.completionModel("auto"), ...settings })).text);
});

await check("embeddings", async () => {
  const { embedding } = await embed({ model: loramux.textEmbeddingModel("auto"), value: "a film" });
  assert.ok(embedding.length > 10);
});

finished();
