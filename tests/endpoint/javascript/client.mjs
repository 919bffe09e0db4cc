// Asks the endpoint at the address in the arguments as a program of somebody's would, and prints what it got as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none" });
const [model] = (await client.models.list()).data;
const retrieved = await client.models.retrieve(model.id);

const { data: images, response, request_id } = await client.images
  .generate({ model: model.id, prompt: "two blue 3", n: 2, size: "32x16", seed: 7, steps: 4, stream: false, user: "me" })
  .withResponse();

async function refused(parameters) {
  try {
    await client.images.generate({ prompt: "a", ...parameters });
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
}

const leaving = new AbortController();
const left = client.images.generate({ prompt: "a", steps: 100 }, { signal: leaving.signal }).catch((error) => error);
const metrics = new URL("/metrics", process.argv[2]);
while (!/^opd_endpoint_active_samples [1-9]/m.test(await (await fetch(metrics)).text()));
leaving.abort();

// More than fit at once, with the two retries that the client makes by itself.
const burst = await Promise.allSettled(
  Array.from({ length: 24 }, (_, seed) => client.images.generate({ prompt: "a", steps: 12, seed })),
);

console.log(JSON.stringify({
  retrieved: retrieved.id === model.id,
  seeds: images.data.map((image) => image.seed),
  size: images.size,
  signatures: images.data.map((image) => Buffer.from(image.b64_json, "base64").subarray(1, 4).toString()),
  named: request_id === response.headers.get("x-request-id") && request_id.startsWith("req_"),
  size_refused: await refused({ size: "33x32" }),
  model_refused: await refused({ model: "gpt-image-1" }),
  aborted: (await left).constructor.name,
  burst: burst.map((each) => each.value?.data[0].seed ?? String(each.reason)),
}));
