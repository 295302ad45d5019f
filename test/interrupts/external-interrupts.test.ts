import fc from 'fast-check'
import { expect, it } from 'vitest'
import { VectorQueue } from '../../src/interrupts/external-interrupts.js'

function drain(queue: VectorQueue): number[] {
  const vectors = []
  while (queue.pending) vectors.push(queue.acknowledge())
  return vectors
}

it('vectors come in the order in which they were asked for', () => {
  const queue = new VectorQueue()
  expect(queue.pending).toBe(false)
  for (const vector of [0x30, 0xff, 0x20, 0]) queue.push(vector)
  expect(queue.pending).toBe(true)
  expect(drain(queue)).toEqual([0x30, 0xff, 0x20, 0])
})

it('a vector that waits keeps its place, and can be asked for again once it was taken', () => {
  const queue = new VectorQueue()
  for (const vector of [1, 2, 1]) queue.push(vector)
  expect(queue.acknowledge()).toBe(1)
  queue.push(1)
  expect(drain(queue)).toEqual([2, 1])
})

it('16: whatever is pushed, no more than the 256 vectors wait', () => {
  fc.assert(
    fc.property(
      fc.array(fc.oneof(fc.integer({ min: -2, max: 300 }), fc.double()), { maxLength: 600 }),
      (all) => {
        const queue = new VectorQueue()
        for (const vector of all) queue.push(vector)
        const valid = all.filter((vector) => Number.isInteger(vector) && vector >= 0 && vector < 256)
        // Object.is tells -0 from 0; a vector is a number as === has it.
        expect(drain(queue).map((vector) => vector + 0)).toEqual([
          ...new Set(valid.map((vector) => vector + 0)),
        ])
      },
    ),
  )
})
