// Calls one method of runpod-sdk as a program of its own and prints what comes of it as the last line, in JSON.
//   node runpod_sdk.mjs SDK_FOLDER BASE_URL KEY METHOD ARGUMENTS
import { pathToFileURL } from "node:url"
import { join } from "node:path"

const [folder, baseUrl, key, method, given] = process.argv.slice(2)
const { default: runpodSdk } = await import(pathToFileURL(join(folder, "dist/src/index.js")).href)
const endpoint = runpodSdk(key, { baseUrl }).endpoint("mine")

const called = async () => {
  const answer = endpoint[method](...JSON.parse(given))
  if (method !== "stream") return await answer
  const told = []
  for await (const chunk of answer) told.push(chunk)
  return told
}

const outcome = await called().then(
  (returned) => ({ returned }),
  (error) => ({ raised: { name: error.name, message: error.message, status: error.response?.status } }),
)
console.log(JSON.stringify(outcome))
