import { defineConfig } from 'vitest/config'

// Packs the package and installs it elsewhere: slower than the other tests, and of no use in the lab.
export default defineConfig({
  test: {
    include: ['test/package/**/*.test.ts'],
    pool: 'forks',
    testTimeout: 120_000,
    hookTimeout: 300_000,
  },
})
