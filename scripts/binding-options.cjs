// How the addon's file is named, for pkg-prebuilds at run time, on install and on packing.
module.exports = { name: 'nodevisor', napi_versions: [8] }
