import type { PageRuns } from './guest-ram.js'

/** No pages. */
export const NO_PAGES: PageRuns = new Uint32Array()

/** How many pages there are. */
export function countPages(runs: PageRuns): number {
  let count = 0
  for (let i = 1; i < runs.length; i += 2) count += runs[i]!
  return count
}

/** The pages that are in one, or in the other. */
export function uniteRuns(one: PageRuns, other: PageRuns): PageRuns {
  if (one.length === 0) return other
  if (other.length === 0) return one
  const united: number[] = []
  for (let i = 0, j = 0; i < one.length || j < other.length; ) {
    const takesOne = j >= other.length || (i < one.length && one[i]! <= other[j]!)
    const [runs, at] = takesOne ? [one, i] : [other, j]
    if (takesOne) i += 2
    else j += 2
    const start = runs[at]!
    const end = start + runs[at + 1]!
    const last = united.length - 2
    const lastEnd = last < 0 ? -1 : united[last]! + united[last + 1]!
    if (start > lastEnd) united.push(start, end - start)
    else if (end > lastEnd) united[last + 1] = end - united[last]!
  }
  return Uint32Array.from(united)
}
