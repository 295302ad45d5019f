#!/usr/bin/env node
import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'
import { Command, CommanderError, Option } from 'commander'
import { KERNEL_NAMES } from '../linux/kernels.js'
import { packageRoot } from '../package-root.js'
import {
  collect,
  type ListenAddress,
  parseCheckpoint,
  parseDuration,
  parseEvery,
  parseInteger,
  parseListenAddress,
} from './arguments.js'
import { EXIT_STATUS } from './exit-status.js'
import { infoCommand } from './info-command.js'
import { type LinuxCommandOptions, linuxCommand } from './linux-command.js'
import { migrateCommand, type TlsCommandOptions } from './migrate-command.js'
import { type ReceiveCommandOptions, receiveCommand } from './receive-command.js'
import { type ResumeCommandOptions, resumeCommand } from './resume-command.js'
import { type RunCommandOptions, runCommand } from './run-command.js'

const { version } = createRequire(import.meta.url)(fileURLToPath(new URL('package.json', packageRoot()))) as {
  version: string
}

const RUN_HELP = `
The terminal is the guest's serial port (COM1), or with --console its virtio console. In a terminal every key goes to the guest; Ctrl-] leaves.

Exit status:
  (v << 1) | 1  the guest wrote v to the debug-exit port 0xf4
  0             the guest halted, powered off or asked for a reset, or the machine was moved
  2             bad usage, an image that cannot be booted, a disk that cannot be opened, or no first checkpoint
  69            KVM is not available (see "nodevisor info")
  70            the machine failed, or a triple fault
  124           --timeout
  130           left by Ctrl-], SIGINT, SIGTERM or SIGHUP

Examples:
  nodevisor run kernel.elf
  nodevisor run boot.bin --mode real --at 0x7c00 --timeout 5s
  nodevisor run kernel.elf --cmdline 'verbose' --module initrd.img --screen --stats
  nodevisor run vmlinuz --memory 512M --initrd initrd.img --cmdline 'console=ttyS0'
  nodevisor run kernel.elf --disk system.img,overlay=changes.img --disk data.img,ro --console
  nodevisor run kernel.elf --checkpoint every=5s,dir=checkpoints
`

const RESUME_HELP = `
Disks are put back to what they were at that moment, so nothing else may have written to them since. The machine's clocks have
gone on. What the guest had printed since then it prints again. Checkpoints go on into the same folder.

The terminal and the exit status are those of "nodevisor run"; 2 also for a folder without a checkpoint.

Examples:
  nodevisor resume checkpoints
  nodevisor resume checkpoints --every 1m
`

const LINUX_HELP = `
The terminal is the guest's console; "exit" there switches the machine off, and Ctrl-] leaves. The first time, kernel tiny is
compiled (a few minutes, Debian's packages, 2 GB while it lasts) and kernel debian downloaded; they stay in
~/.cache/nodevisor/linux. The exit status is that of "nodevisor run".

Examples:
  nodevisor linux
  nodevisor linux --kernel debian --cpus 2 --disk system.img,overlay
  nodevisor linux --cmdline 'console=ttyS0 quiet'
`

const RECEIVE_HELP = `
HOST is 127.0.0.1 unless given. Whoever can connect can run a guest here: with --tls-cert, --tls-key and --tls-ca only those
whose certificate is of --tls-ca. The terminal and the exit status are those of "nodevisor run".

Examples:
  nodevisor receive 4000 --control /tmp/machine.sock
  nodevisor receive 0.0.0.0:4000 --disk-folder /srv/disks --tls-cert b.pem --tls-key b.key --tls-ca ca.pem
`

const MIGRATE_HELP = `
The machine is one that was started with --control SOCKET. It runs on while its memory is sent; if that fails, it goes on
here. Exit status: 0 when it was moved, 70 when not, 2 when there is no machine at SOCKET.

Examples:
  nodevisor migrate /tmp/machine.sock 127.0.0.1:4000
  nodevisor migrate /tmp/machine.sock other.example:4000 --tls-cert a.pem --tls-key a.key --tls-ca ca.pem
`

function withTls(command: Command): Command {
  return command
    .option('--tls-cert <file>', 'go through TLS, with this certificate (PEM)')
    .option('--tls-key <file>', 'the key of the certificate')
    .option('--tls-ca <file>', 'certificates that the other side has to have, or be signed by')
}

function program(): Command {
  const command = new Command('nodevisor')
    .description('Virtual machines on KVM.')
    .version(version)
    .exitOverride()
    .showHelpAfterError('(add --help for the options)')
  command
    .command('run')
    .description('boot a kernel image: Linux, ELF, multiboot, PVH or flat binary')
    .argument('<image>', 'the kernel image')
    .option(
      '--format <format>',
      'flat, elf, elf32, elf64, multiboot, multiboot2, pvh, bzimage or linux (default: detected)',
    )
    .option('--mode <mode>', 'mode a flat image starts in: real, protected or long (default: real)')
    .option(
      '--at <address>',
      'load address of a flat image (default: 0x7c00 in real mode, else 0x100000)',
      parseInteger,
    )
    .option('--memory <size>', 'RAM, with K, M or G', '64M')
    .option('--cpus <n>', 'virtual processors', parseInteger, 1)
    .option('--cmdline <text>', "the kernel's command line")
    .option('--module <file>', 'a module for the kernel; may be given several times', collect)
    .option('--initrd <file>', "Linux's initramfs; may be given several times", collect)
    .option('--no-unpack', 'let a bzImage unpack itself')
    .option('--execution <way>', 'auto, inline or threads', 'auto')
    .option('--cpu <model>', 'processor: host, x86-64-v2, …, with features as host,-avx2,+x2apic')
    .option(
      '--fw-cfg <name=file>',
      'a file for the guest to read through fw_cfg; may be given several times',
      collect,
    )
    .option(
      '--disk <file[,ro][,overlay[=file]]>',
      'a disk image; writes go to the overlay if there is one; may be given several times',
      collect,
    )
    .option(
      '--console',
      'a virtio console; the terminal is connected to it, and no longer to the serial port',
    )
    .option('--rng', 'a virtio source of random numbers')
    .option('--irqchip <where>', 'interrupt controllers: auto, full, split or none', 'auto')
    .option(
      '--checkpoint <every=time,dir=folder>',
      'keep a state in an empty folder that "nodevisor resume" goes on from should this process be killed',
      parseCheckpoint,
    )
    .option('--timeout <duration>', 'stop after 500ms, 5s, 2m, …', parseDuration)
    .option(
      '--serial <where>',
      'stdio, none or a file for the output (default: stdio; with --json or --console: none)',
    )
    .option('--screen', 'print the text screen at the end')
    .option('--stats', 'print exits and times at the end, to standard error')
    .option('--json', 'print one JSON object at the end, with the serial output in it')
    .option('--control <socket>', 'a Unix socket that "nodevisor migrate" moves the machine by')
    .addHelpText('after', RUN_HELP)
    .action(async (image: string, options: RunCommandOptions) => {
      process.exitCode = await runCommand(image, options)
    })
  command
    .command('resume')
    .description('go on from the last checkpoint of a machine whose process was killed')
    .argument('<folder>', 'what "nodevisor run --checkpoint" was given as dir')
    .option(
      '--every <duration>',
      'time between checkpoints: 500ms, 5s, 2m, … (default: as before)',
      parseEvery,
    )
    .option('--execution <way>', 'auto, inline or threads (default: as before)')
    .option('--timeout <duration>', 'stop after 500ms, 5s, 2m, …', parseDuration)
    .option('--serial <where>', 'stdio, none or a file for the output, as for "run"')
    .option('--screen', 'print the text screen at the end')
    .option('--stats', 'print exits and times at the end, to standard error')
    .option('--json', 'print one JSON object at the end, with the serial output in it')
    .option('--control <socket>', 'as for "run"')
    .addHelpText('after', RESUME_HELP)
    .action(async (folder: string, options: ResumeCommandOptions) => {
      process.exitCode = await resumeCommand(folder, options)
    })
  command
    .command('linux')
    .description('boot a ready-made Linux to a shell')
    .addOption(
      new Option('--kernel <kernel>', 'tiny starts quickest; debian has all of the drivers')
        .choices(KERNEL_NAMES)
        .default('tiny'),
    )
    .option('--memory <size>', 'RAM, with K, M or G', '256M')
    .option('--cpus <n>', 'virtual processors', parseInteger, 1)
    .option(
      '--disk <file[,ro][,overlay[=file]]>',
      'a disk image, /dev/vda and so on; as for "run"; may be given several times',
      collect,
    )
    .option('--cmdline <text>', 'more for the kernel; with console=ttyS0 the terminal is the serial port')
    .option('--timeout <duration>', 'stop after 500ms, 5s, 2m, …', parseDuration)
    .addHelpText('after', LINUX_HELP)
    .action(async (options: LinuxCommandOptions) => {
      process.exitCode = await linuxCommand(options)
    })
  withTls(command.command('receive'))
    .description('wait for a machine that "nodevisor migrate" moves here, and run it')
    .argument('<address>', 'HOST:PORT to listen at', parseListenAddress)
    .addOption(
      new Option('--execution <way>', 'where the guest runs (default: as before)').choices([
        'auto',
        'inline',
        'threads',
      ]),
    )
    .option(
      '--disk-folder <folder>',
      "where the files of the machine's disks may be; may be given several times",
      collect,
    )
    .option('--control <socket>', 'as for "run"')
    .addHelpText('after', RECEIVE_HELP)
    .action(async (address: ListenAddress, options: ReceiveCommandOptions) => {
      process.exitCode = await receiveCommand(address, options)
    })
  withTls(command.command('migrate'))
    .description('move a machine that runs to where "nodevisor receive" waits for it')
    .argument('<socket>', 'the --control of the machine')
    .argument('[address]', 'HOST:PORT of the other side')
    .option('--resume', 'in place of the address: let it go on here, where nobody knows how a move has ended')
    .addHelpText('after', MIGRATE_HELP)
    .action(
      async (
        socket: string,
        address: string | undefined,
        options: TlsCommandOptions & { readonly resume?: boolean },
      ) => {
        process.exitCode = await migrateCommand(socket, address, options)
      },
    )
  command
    .command('info')
    .description("say what this host's KVM is and can do, or what to do if it can't")
    .option('--json', 'print one JSON object')
    .action((options: { json?: boolean }) => {
      process.exitCode = infoCommand(options)
    })
  return command
}

// Whoever reads may stop before the end, as `head` does: what is left is for nobody, and no error.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error
})

try {
  await program().parseAsync()
} catch (error) {
  if (!(error instanceof CommanderError)) throw error
  // Help and version are no errors; commander has printed all there is to say.
  process.exitCode = error.exitCode === 0 ? EXIT_STATUS.ok : EXIT_STATUS.usage
}
