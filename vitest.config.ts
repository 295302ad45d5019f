import { defineConfig } from 'vitest/config'
import { TEST_LIMIT } from './test/helpers/limits.js'

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    exclude: [
      // Packs and installs the package: `npm run test:package`.
      'test/package/**',
      // Boots kernels that take minutes to make: `npm run test:linux`.
      ...(process.env.NODEVISOR_TEST_LINUX ? [] : ['test/linux/**']),
    ],
    // The addon runs guests on the JavaScript thread and has signal handlers: processes, not worker threads.
    pool: 'forks',
    reporters: ['default', ...(process.env.NODEVISOR_TEST_EVENTS ? ['./scripts/test-events.ts'] : [])],
    testTimeout: TEST_LIMIT,
    hookTimeout: TEST_LIMIT,
  },
})
