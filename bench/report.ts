/** Rows of the report: what was measured, against what, and whether it is within its bound. */

import Table from 'cli-table3'
import { median } from './lib.js'

export type Unit = 'ns' | 'bytes' | 'count' | 'cycles'

/** Something measured. */
export interface Figure {
  readonly value: number
  readonly unit: Unit
  /** Something measured with it, such as another percentile. */
  readonly also?: Readonly<Record<string, number>>
}

/** One line of the report. */
export interface Row {
  /** What is measured, of nodevisor. */
  readonly what: string
  readonly ours: Figure
  /** What it is compared with; without a figure where the host does not have it. Without a ratio it is for scale. */
  readonly peer?: { readonly name: string; readonly figure?: Figure }
  /** How `ours` relates to the peer: how many times as long or as much, as fast, faster, or less. */
  readonly ratio?: { readonly value: number; readonly kind: 'times' | 'speed' | 'faster' | 'less' }
  /** What the ratio must keep to, or the figure if there is none, or `of` says so. */
  readonly bound?: ({ readonly max: number } | { readonly min: number }) & { readonly of?: 'figure' }
}

export type Verdict = 'ok' | 'missed' | 'not compared' | ''

/** What was measured of both sides in the same rounds. */
export interface Comparison {
  readonly what: string
  readonly unit: Unit
  /** One figure a round. */
  readonly ours: readonly number[]
  readonly peer: string
  /** One figure a round; none where the host does not have the peer. */
  readonly theirs: readonly number[]
  readonly kind?: NonNullable<Row['ratio']>['kind']
  readonly bound?: Row['bound']
}

/** A row with the medians of both, and the median of the rounds' ratios: what a moment did to both of them cancels. */
export function compare({ what, unit, ours, peer, theirs, kind = 'times', bound }: Comparison): Row {
  const row = { what, ours: { value: median(ours), unit }, ...(bound === undefined ? {} : { bound }) }
  if (theirs.length === 0) return { ...row, peer: { name: peer } }
  const ratios = ours.map((value, round) =>
    kind === 'times' ? value / theirs[round]! : theirs[round]! / value,
  )
  return {
    ...row,
    peer: { name: peer, figure: { value: median(theirs), unit } },
    ratio: { value: median(ratios), kind },
  }
}

/** A row with the median of what was measured, and nothing to compare it with. */
export function alone(what: string, unit: Unit, values: readonly number[], bound?: Row['bound']): Row {
  return { what, ours: { value: median(values), unit }, ...(bound === undefined ? {} : { bound }) }
}

/** Whether a row keeps to its bound. */
export function judge(row: Row): Verdict {
  const { ours, ratio, bound } = row
  if (bound === undefined) return ''
  const value = boundsRatio(row) ? ratio?.value : ours.value
  if (value === undefined) return 'not compared'
  return ('max' in bound ? value <= bound.max : value >= bound.min) ? 'ok' : 'missed'
}

/** The rows as a table. */
export function renderTable(rows: readonly Row[]): string {
  const table = new Table({
    head: ['what', 'nodevisor', 'compared with', '', 'ratio', 'bound', ''],
    colAligns: ['left', 'right', 'left', 'right', 'right', 'right', 'left'],
    style: { head: [], border: [], compact: true },
  })
  for (const row of rows) {
    const { what, ours, peer, ratio } = row
    table.push([
      what,
      showFigure(ours),
      peer?.name ?? '',
      peer === undefined ? '' : peer.figure === undefined ? 'not installed' : showFigure(peer.figure),
      ratio === undefined ? '' : showRatio(ratio),
      showBound(row),
      judge(row),
    ])
  }
  return table.toString()
}

/** Whether the bound is the ratio's, also where the host has nothing to compare with. */
function boundsRatio({ ratio, peer, bound }: Row): boolean {
  if (bound?.of === 'figure') return false
  return ratio !== undefined || (peer !== undefined && peer.figure === undefined)
}

function showBound(row: Row): string {
  const { ours, bound } = row
  if (bound === undefined) return ''
  const [sign, value] = 'max' in bound ? ['≤', bound.max] : ['≥', bound.min]
  return `${sign} ${boundsRatio(row) ? `${value}` : show(value, ours.unit)}`
}

function showRatio({ value, kind }: NonNullable<Row['ratio']>): string {
  if (kind === 'faster' || kind === 'less') return `${value.toFixed(value < 10 ? 1 : 0)} × ${kind}`
  return `${value.toFixed(value < 0.995 || kind === 'speed' ? 3 : 2)} ×`
}

function showFigure({ value, unit, also = {} }: Figure): string {
  const more = Object.entries(also).map(([name, other]) => `${name} ${show(other, unit)}`)
  return [show(value, unit), ...more].join(', ')
}

const SCALES: Readonly<Record<Unit, readonly (readonly [number, string])[]>> = {
  ns: [
    [1e9, 's'],
    [1e6, 'ms'],
    [1e3, 'µs'],
    [1, 'ns'],
  ],
  bytes: [
    [2 ** 20, 'MiB'],
    [2 ** 10, 'KiB'],
    [1, 'B'],
  ],
  cycles: [
    [1e9, 'G cycles'],
    [1e6, 'M cycles'],
    [1, 'cycles'],
  ],
  count: [[1, '']],
}

function show(value: number, unit: Unit): string {
  const scales = SCALES[unit]
  const [factor, name] = scales.find(([factor]) => Math.abs(value) >= factor) ?? scales.at(-1)!
  const scaled = value / factor
  return `${Number(scaled.toPrecision(3))} ${name}`.trimEnd()
}
