// What the scripts of this folder share: a line a check, and an exit status that says whether all held.
import { readFileSync } from "node:fs";

export const API = process.env.LORAMUX_URL + "/v1";
export const ASK = "How many points did Ferrari score in the 1998 season?";
let failed = 0;

export function started(...names) {
  const version = (name) => JSON.parse(readFileSync(`node_modules/${name}/package.json`)).version;
  // Two libraries are called openai.
  const shown = (name) => `${name} ${version(name)}${name === "openai" ? " (JavaScript)" : ""}`;
  console.log("version", names.map(shown).join(", "));
}

export async function check(name, work) {
  try {
    await work();
    console.log("ok", name);
  } catch (error) {
    failed += 1;
    console.log("FAILED", name);
    console.error(error);
  }
}

export function finished() {
  process.exit(failed);
}
