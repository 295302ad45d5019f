/** How long a test may take, in ms. The lab, where everything takes longer, gives more by this variable. */
export const TEST_LIMIT = Number(process.env.NODEVISOR_TEST_LIMIT ?? 20_000)

/** How long a guest may run in a test, in ms: not as long as the test, so that its result says where it stood. */
export const RUN_LIMIT = TEST_LIMIT * 0.75
