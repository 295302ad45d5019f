import { existsSync } from 'node:fs'

/** The package's folder: seen from its source, and from whatever file in `dist` this was bundled into. */
export function packageRoot(): URL {
  for (let folder = new URL('.', import.meta.url); ; folder = new URL('..', folder)) {
    if (existsSync(new URL('package.json', folder))) return folder
  }
}
