import fs from 'node:fs'
import { promisify } from 'node:util'

const readSome = promisify(fs.read)

/** Bytes that are asked for at a time: Node.js takes fewer than 2 GiB. */
const MAX_READ = 2 ** 30

/** Opens a regular file for reading; anything else is refused, and not waited for. */
export async function openFile(path: string): Promise<fs.promises.FileHandle> {
  const handle = await fs.promises.open(path, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK)
  try {
    if ((await handle.stat()).isFile()) return handle
    throw new Error(`Expected '${path}' to be a file`)
  } catch (error) {
    await handle.close()
    throw error
  }
}

/** Fills `bytes` from `position` on. */
export async function readFully(fd: number, bytes: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    const length = Math.min(bytes.length - done, MAX_READ)
    const { bytesRead } = await readSome(fd, bytes, done, length, position + done)
    if (bytesRead === 0) throw new Error(`Expected more bytes but the file ends at ${position + done}`)
    done += bytesRead
  }
}

/** Writes all of `bytes` to `position`. */
export async function writeFully(
  handle: fs.promises.FileHandle,
  bytes: Uint8Array,
  position: number,
): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    const { bytesWritten } = await handle.write(bytes, done, bytes.length - done, position + done)
    if (bytesWritten === 0)
      throw new Error(`Expected to write but the file takes no more at ${position + done}`)
    done += bytesWritten
  }
}
