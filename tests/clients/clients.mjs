// openai-js and the Vercel AI SDK against a real server: a chat, a stream, a round of tools, an answer that fits a
// schema. Run by test_clients.py as `node clients.mjs URL KEY MODEL`; prints the name of each client that passed.
import assert from 'node:assert/strict';
import OpenAI from 'openai';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, streamText, stepCountIs, tool } from 'ai';
import { z } from 'zod';

const [baseURL, apiKey, name] = process.argv.slice(2);
const ask = 'Paint the door red.';

async function openai() {
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  const messages = [{ role: 'user', content: ask }];
  const answer = await client.chat.completions.create({ model: name, messages, max_tokens: 6 });
  messages.push(answer.choices[0].message, { role: 'user', content: [{ type: 'text', text: 'Why?' }] });
  let text = '';
  for await (const chunk of await client.chat.completions.create({ model: name, messages, max_tokens: 6, stream: true }))
    text += chunk.choices[0]?.delta?.content ?? '';
  assert.notEqual(text, '');
  const paint = { name: 'paint', parameters: { type: 'object', properties: { colour: { enum: ['red', 'blue'] } }, required: ['colour'] } };
  const asked = { model: name, messages: [{ role: 'user', content: ask }], tools: [{ type: 'function', function: paint }] };
  const called = (await client.chat.completions.create({ ...asked, tool_choice: 'required', parallel_tool_calls: false })).choices[0].message;
  assert.match(JSON.parse(called.tool_calls[0].function.arguments).colour, /red|blue/);
  const done = { role: 'tool', tool_call_id: called.tool_calls[0].id, content: 'done' };
  await client.chat.completions.create({ ...asked, messages: [...asked.messages, called, done], max_tokens: 6 });
  assert.ok((await client.responses.create({ model: name, input: ask, max_output_tokens: 6 })).output_text);
}

const oneCall = { openai: { parallelToolCalls: false }, ours: { parallel_tool_calls: false } };

async function ai(model) {
  const given = { model, prompt: ask, maxRetries: 0 };
  assert.ok((await generateText({ ...given, maxOutputTokens: 6 })).text);
  let text = '';
  for await (const piece of streamText({ ...given, maxOutputTokens: 6 }).textStream) text += piece;
  assert.notEqual(text, '');
  const schema = z.object({ colour: z.enum(['red', 'blue']) });
  assert.match((await generateObject({ ...given, schema })).object.colour, /red|blue/);
  const paint = tool({ description: 'Paint a door.', inputSchema: schema, execute: async () => 'done' });
  const round = await generateText({
    ...given, tools: { paint }, maxOutputTokens: 40, providerOptions: oneCall, stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? 'auto' : 'required' }),
  });
  assert.equal(round.steps[0].toolResults[0].output, 'done');
  assert.equal(round.steps.length, 2);
}

await openai();
console.log('openai');
await ai(createOpenAICompatible({ name: 'ours', baseURL, apiKey, supportsStructuredOutputs: true })(name));
console.log('ai-compatible');
await ai(createOpenAI({ baseURL, apiKey })(name)); // its default: /v1/responses
console.log('ai-openai');
