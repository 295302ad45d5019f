import { constants } from 'node:fs'
import { open } from 'node:fs/promises'
import type { BootModule } from '../boot/boot-image.js'
import { NodevisorError } from '../errors.js'
import { checkModule, describeSource, type ImageSource, type KernelOptions } from './options.js'

/** The largest image file read, in bytes: what a Uint8Array can hold everywhere. */
const MAX_IMAGE_SIZE = 2 ** 31 - 1

/** The bytes of an image. @throws `ERR_IMAGE_READ`, `ERR_IMAGE_TOO_LARGE` */
export async function readImage(source: ImageSource): Promise<Uint8Array> {
  if (source instanceof Uint8Array) return source
  const path = describeSource(source)
  try {
    // Not to wait for a FIFO's writer: what is no regular file is refused below.
    const file = await open(source, constants.O_RDONLY | constants.O_NONBLOCK)
    try {
      const stat = await file.stat()
      if (!stat.isFile()) {
        throw new NodevisorError('ERR_IMAGE_READ', `Expected a regular file but ${path} is none`, { path })
      }
      if (stat.size > MAX_IMAGE_SIZE) {
        throw new NodevisorError(
          'ERR_IMAGE_TOO_LARGE',
          `Expected an image of less than 2 GiB but ${path} has ${stat.size} bytes`,
          { path, size: stat.size },
        )
      }
      return await file.readFile()
    } finally {
      await file.close()
    }
  } catch (cause) {
    if (cause instanceof NodevisorError) throw cause
    const why = cause instanceof Error ? cause.message : String(cause)
    throw new NodevisorError('ERR_IMAGE_READ', `Expected a readable image at ${path} but: ${why}`, {
      path,
      cause,
    })
  }
}

/** The modules of a kernel, read. */
export function readModules(kernel: KernelOptions): Promise<BootModule[]> {
  return Promise.all(
    (kernel.modules ?? []).map(async (module, index) => {
      const { image, cmdline } = checkModule(module, index)
      return { bytes: await readImage(image), cmdline }
    }),
  )
}
