import { defineConfig } from 'vitest/config'

// Packs the package and installs it elsewhere: slower than the other tests, and of no use in the lab.
export default defineConfig({
  test: {
    include: ['test/package/**/*.test.ts'],
    pool: 'forks',
    reporters: ['default', ...(process.env.NODEVISOR_TEST_EVENTS ? ['./scripts/test-events.ts'] : [])],
    testTimeout: 120_000,
    hookTimeout: 300_000,
  },
})
