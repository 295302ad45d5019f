import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'
import { LAB_ROOT } from './contents.js'
import type { LabKernel } from './kernel.js'

/** How to start the lab, and who listens. */
export interface LabOptions {
  readonly kernel: LabKernel
  /** Path of the archive that {@link packLab} wrote. */
  readonly initramfs: string
  /** MiB. */
  readonly memory: number
  /** Kills the lab. */
  readonly signal: AbortSignal
  /** The init script runs. */
  readonly onBoot: () => void
  /** A line that the command printed. */
  readonly onOutput: (line: string) => void
  /** A line that the command wrote to {@link EVENTS}. */
  readonly onEvent: (line: string) => void
}

/** The second serial port: what programs, not people, want to know. */
export const EVENTS = '/dev/ttyS1'
const OUTPUT = '/dev/ttyS0'
const BOOTED = 'LAB BOOTED'
const EXIT = /^LAB EXIT (\d+)$/

/** Process 1 of the lab: runs a shell command in the project's folder and switches the machine off. */
export function initScript(command: string, environment: Readonly<Record<string, string>>): string {
  const assignments = Object.entries(environment).map(([name, value]) => `${name}=${shellQuote(value)}`)
  return `
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /dev/shm
ln -sf /proc/self/fd /dev/fd
export PATH=/bin:/usr/bin HOME=/root TERM=dumb ${assignments.join(' ')}
stty -F ${OUTPUT} raw
stty -F ${EVENTS} raw
ip link set lo up
for module in irqbypass kvm kvm-amd; do insmod /modules/$module.ko; done
echo '${BOOTED}' > ${EVENTS}
cd ${LAB_ROOT}
# Through a pipe, as programs behave differently on a terminal.
{
  ( ${command}
  ) < /dev/null 2>&1
  echo $? > /status
} | cat > ${OUTPUT}
# Waits until all of the output has been sent.
stty -F ${OUTPUT} raw
echo "LAB EXIT $(cat /status)" > ${EVENTS}
poweroff -f
`
}

/** A word of a shell command. */
export function shellQuote(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`
}

/**
 * Boots the lab: a Debian kernel with real `kvm_amd`, on the AMD-V that QEMU's software CPU emulates.
 *
 * @returns the command's exit status; undefined if the lab ended without one
 */
export async function runLab(options: LabOptions): Promise<number | undefined> {
  const qemu = spawn(
    'qemu-system-x86_64',
    [
      // One processor: with two that have a thread each, QEMU 7.2 now and then loses an interrupt, a timer's perhaps, of
      // one that runs guests, and the lab stands still; with two in one thread, each waits up to 100 ms for its turn.
      ['-M', 'q35', '-accel', 'tcg,thread=single', '-cpu', 'EPYC-v2,+svm,+npt', '-smp', '1'],
      ['-m', String(options.memory), '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot'],
      ['-chardev', 'stdio,id=output,signal=off', '-serial', 'chardev:output'],
      ['-chardev', 'socket,id=events,fd=3', '-serial', 'chardev:events'],
      ['-kernel', options.kernel.image, '-initrd', options.initramfs],
      ['-append', 'console=ttyS0 panic=-1 quiet loglevel=1 mitigations=off'],
    ].flat(),
    { stdio: ['ignore', 'pipe', 'pipe', 'pipe'], signal: options.signal, killSignal: 'SIGKILL' },
  )
  let status: number | undefined
  const lines = (stream: Readable, listener: (line: string) => void) => {
    const reader = createInterface({ input: stream, crlfDelay: Number.POSITIVE_INFINITY })
    reader.on('line', (line) => listener(line.replaceAll('\r', '')))
    return once(reader, 'close')
  }
  const finished = Promise.all([
    once(qemu, 'close'),
    lines(qemu.stdout!, options.onOutput),
    // What the emulated processor cannot do.
    lines(qemu.stderr!, (line) => {
      if (!line.includes("TCG doesn't support requested feature")) options.onOutput(line)
    }),
    lines(qemu.stdio[3] as Readable, (line) => {
      const exit = EXIT.exec(line)
      if (exit !== null) status = Number(exit[1])
      else if (line === BOOTED) options.onBoot()
      else options.onEvent(line)
    }),
  ])
  await finished
  return status
}
