import { promises as fs } from 'node:fs'

/** Makes durable what is in a file, or which files are in a folder: a new name is durable once its folder is. */
export async function syncPath(path: string): Promise<void> {
  const handle = await fs.open(path, 'r')
  try {
    await handle.sync()
  } finally {
    await handle.close()
  }
}
