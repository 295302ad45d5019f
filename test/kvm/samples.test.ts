import { expect, it } from 'vitest'
import type { Segment } from '../../src/kvm/index.js'
import { makeMetal, nextExit, outputUntil } from './metal.js'

it('runs the guest of LWN\'s "Using the KVM API": it adds two numbers and prints the digit', () => {
  // https://lwn.net/Articles/658511/
  const code = [
    0xba,
    0xf8,
    0x03, // mov $0x3f8, %dx
    0x00,
    0xd8, //       add %bl, %al
    0x04,
    0x30, //       add $'0', %al
    0xee, //             out %al, (%dx)
    0xb0,
    0x0a, //       mov $'\n', %al
    0xee, //             out %al, (%dx)
    0xf4, //             hlt
  ]
  const { vcpu } = makeMetal({ code })
  vcpu.setRegs({ ...vcpu.getRegs(), rip: 0x1000n, rax: 2n, rbx: 2n, rflags: 2n })
  let printed = ''
  for (let exit = nextExit(vcpu); exit.kind !== 'halt'; exit = nextExit(vcpu)) {
    expect(exit).toMatchObject({ kind: 'io', direction: 'out', size: 1, port: 0x3f8, count: 1 })
    if (exit.kind === 'io') printed += String.fromCharCode(...exit.data)
  }
  expect(printed).toBe('4\n')
})

/** mov dx, 0xe9; each character; then 42 to memory at 0x400 and to rax; hlt. For any mode but real. */
function helloCode(text: string): number[] {
  return [
    ...[...Buffer.from(text)].flatMap((byte) => [0xb0, byte, 0xe6, 0xe9]),
    0xb8,
    0x2a,
    0x00,
    0x00,
    0x00, // mov $42, %eax
    0xbb,
    0x00,
    0x04,
    0x00,
    0x00, // mov $0x400, %ebx
    0x89,
    0x03, //                   mov %eax, (%rbx)
    0xf4, //                         hlt
  ]
}

const FLAT: Segment = {
  base: 0n,
  limit: 0xffff_ffff,
  selector: 8,
  present: true,
  type: 11, // code: execute, read, accessed
  dpl: 0,
  db: 0,
  s: 1,
  l: 1,
  g: 1,
  avl: 0,
  unusable: false,
}

it('runs a guest in protected mode, with segments made by hand', () => {
  const { vcpu, memory } = makeMetal({ code: helloCode('Hello, protected mode!\n') })
  const sregs = vcpu.getSregs()
  const cs = { ...FLAT, l: 0, db: 1 }
  const data = { ...cs, selector: 16, type: 3 }
  vcpu.setSregs({
    ...sregs,
    cr0: sregs.cr0 | 1n, // PE
    cs,
    ds: data,
    es: data,
    fs: data,
    gs: data,
    ss: data,
  })
  expect(Buffer.from(outputUntil(vcpu, 'halt')).toString()).toBe('Hello, protected mode!\n')
  expect(vcpu.getRegs().rax).toBe(42n)
  expect(memory[0x400]).toBe(42)
})

it('runs a guest in long mode, with page tables made by hand', () => {
  const { vcpu, memory } = makeMetal({ code: helloCode('Hello, long mode!\n') })
  // Four levels: 2 MiB at virtual 0, and the same again at 4 MiB, all writable.
  const tables = new DataView(memory.buffer)
  const [pml4, pdpt, pd] = [0x2000, 0x3000, 0x4000]
  tables.setBigUint64(pml4, BigInt(pdpt | 0x7), true)
  tables.setBigUint64(pdpt, BigInt(pd | 0x7), true)
  tables.setBigUint64(pd, 0x87n, true)
  tables.setBigUint64(pd + 16, 0x87n, true)
  const sregs = vcpu.getSregs()
  const data = { ...FLAT, selector: 16, type: 3 }
  vcpu.setSregs({
    ...sregs,
    cr3: BigInt(pml4),
    cr4: 1n << 5n, // PAE
    cr0: (1n << 0n) | (1n << 1n) | (1n << 4n) | (1n << 5n) | (1n << 16n) | (1n << 31n), // PE MP ET NE WP PG
    efer: (1n << 8n) | (1n << 10n), // LME, LMA
    cs: FLAT,
    ds: data,
    es: data,
    fs: data,
    gs: data,
    ss: data,
  })

  expect(vcpu.translate(0x40_1000n)).toMatchObject({ valid: true, physicalAddress: 0x1000n })
  expect(vcpu.translate(0x20_0000n)).toMatchObject({ valid: false })
  // Started at the alias.
  vcpu.setRegs({ ...vcpu.getRegs(), rip: 0x40_1000n })
  expect(Buffer.from(outputUntil(vcpu, 'halt')).toString()).toBe('Hello, long mode!\n')
  expect(vcpu.getRegs().rax).toBe(42n)
  expect(memory[0x400]).toBe(42)
})

it('runs a guest that asks the host and gets answers', () => {
  // in al, 0x10; mov bl, al; in al, 0x10; add al, bl; out 0x11, al; hlt
  const { vcpu } = makeMetal({ code: [0xe4, 0x10, 0x88, 0xc3, 0xe4, 0x10, 0x00, 0xd8, 0xe6, 0x11, 0xf4] })
  for (const answer of [40, 2]) {
    const exit = nextExit(vcpu)
    expect(exit).toMatchObject({ kind: 'io', direction: 'in', port: 0x10 })
    if (exit.kind === 'io') exit.data[0] = answer
  }
  expect(outputUntil(vcpu, 'halt')).toEqual([42])
})
