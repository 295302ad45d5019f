#include "vm.h"

#include "linux_kvm.h"
#include <algorithm>
#include <vector>

#include "addon.h"
#include "guest_ram.h"

Napi::Function Vm::define(Napi::Env env) {
  return DefineClass(env, "Vm",
                     {InstanceMethod<&Vm::checkExtension>("checkExtension"),
                      InstanceMethod<&Vm::enableCap>("enableCap"),
                      InstanceMethod<&Vm::setUserMemoryRegion>("setUserMemoryRegion"),
                      InstanceMethod<&Vm::getDirtyLog>("getDirtyLog"),
                      InstanceMethod<&Vm::clearDirtyLog>("clearDirtyLog"),
                      InstanceMethod<&Vm::setTssAddr>("setTssAddr"),
                      InstanceMethod<&Vm::setIdentityMapAddr>("setIdentityMapAddr"),
                      InstanceMethod<&Vm::setBootCpuId>("setBootCpuId"),
                      InstanceMethod<&Vm::createVcpu>("createVcpu"),
                      InstanceMethod<&Vm::createIrqchip>("createIrqchip"),
                      InstanceMethod<&Vm::getIrqchip>("getIrqchip"),
                      InstanceMethod<&Vm::setIrqchip>("setIrqchip"),
                      InstanceMethod<&Vm::createPit2>("createPit2"),
                      InstanceMethod<&Vm::getPit2>("getPit2"),
                      InstanceMethod<&Vm::setPit2>("setPit2"),
                      InstanceMethod<&Vm::irqLine>("irqLine"),
                      InstanceMethod<&Vm::setGsiRouting>("setGsiRouting"),
                      InstanceMethod<&Vm::signalMsi>("signalMsi"),
                      InstanceMethod<&Vm::irqfd>("irqfd"),
                      InstanceMethod<&Vm::ioeventfd>("ioeventfd"),
                      InstanceMethod<&Vm::coalescedZone>("coalescedZone"),
                      InstanceMethod<&Vm::getClock>("getClock"),
                      InstanceMethod<&Vm::setClock>("setClock"),
                      InstanceMethod<&Vm::close>("close")});
}

Vm::Vm(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<Vm>(info),
      state_(std::make_shared<VmState>(info[0].As<Napi::Number>().Int32Value())),
      vcpuMapSize_(uint32Of(info[1], "vcpuMapSize")) {}

int Vm::fd(Napi::Env env) const {
  if (!state_) throwClosed(env, "Vm");
  return state_->fd.get();
}

Napi::Value Vm::done(const Napi::CallbackInfo& info, int result, const char* name) const {
  if (result < 0) throwErrno(info.Env(), name);
  return info.Env().Undefined();
}

template <typename T>
Napi::Value Vm::structIoctl(const Napi::CallbackInfo& info, unsigned long request, const char* name) {
  return done(info, ioctlRetry(fd(info.Env()), request, structOf(info[0], sizeof(T), name)), name);
}

Napi::Value Vm::checkExtension(const Napi::CallbackInfo& info) {
  int value = ioctlRetry(fd(info.Env()), KVM_CHECK_EXTENSION, uint32Of(info[0], "capability"));
  if (value < 0) throwErrno(info.Env(), "KVM_CHECK_EXTENSION");
  return Napi::Number::New(info.Env(), value);
}

Napi::Value Vm::enableCap(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_enable_cap>(info, KVM_ENABLE_CAP, "KVM_ENABLE_CAP");
}

// setUserMemoryRegion(slot, flags, guestAddress, size, ram, offset): a size of 0 removes the slot.
Napi::Value Vm::setUserMemoryRegion(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  kvm_userspace_memory_region region = {};
  region.slot = uint32Of(info[0], "slot");
  region.flags = uint32Of(info[1], "flags");
  region.guest_phys_addr = uint64Of(info[2], "guestAddress");
  region.memory_size = uint64Of(info[3], "size");
  std::shared_ptr<Mapping> mapping;
  if (region.memory_size != 0) {
    mapping = GuestRam::Unwrap(info[4].As<Napi::Object>())->mapping();
    if (!mapping) throwClosed(env, "GuestRam");
    uint64_t offset = uint64Of(info[5], "offset");
    if (offset > mapping->length() || region.memory_size > mapping->length() - offset) {
      throw Napi::RangeError::New(env, "Expected a part of the RAM for offset and size");
    }
    region.userspace_addr = reinterpret_cast<uint64_t>(mapping->data() + offset);
  }
  if (ioctlRetry(fd(env), KVM_SET_USER_MEMORY_REGION, &region) != 0) throwErrno(env, "KVM_SET_USER_MEMORY_REGION");
  if (mapping) {
    state_->slots[region.slot] = {mapping, region.memory_size};
  } else {
    state_->slots.erase(region.slot);
  }
  return env.Undefined();
}

namespace {
/** Bytes of a dirty bitmap: KVM reads and writes it in words of 64 pages. */
uint64_t bitmapSize(uint64_t pages) { return (pages + 63) / 64 * 8; }
}  // namespace

// getDirtyLog(slot, bitmap): fills the bitmap, one bit a page.
Napi::Value Vm::getDirtyLog(const Napi::CallbackInfo& info) {
  kvm_dirty_log log = {};
  log.slot = uint32Of(info[0], "slot");
  auto bitmap = bytesOf(info[1], "bitmap");
  fd(info.Env());
  auto slot = state_->slots.find(log.slot);
  uint64_t needed = slot == state_->slots.end() ? 0 : bitmapSize(slot->second.size / 4096);
  if (bitmap.length < needed) {
    throw Napi::RangeError::New(info.Env(), "Expected at least " + std::to_string(needed) + " bytes for bitmap");
  }
  log.dirty_bitmap = bitmap.data;
  return done(info, ioctlRetry(fd(info.Env()), KVM_GET_DIRTY_LOG, &log), "KVM_GET_DIRTY_LOG");
}

// clearDirtyLog(slot, firstPage, pages, bitmap)
Napi::Value Vm::clearDirtyLog(const Napi::CallbackInfo& info) {
  kvm_clear_dirty_log log = {};
  log.slot = uint32Of(info[0], "slot");
  log.first_page = uint64Of(info[1], "firstPage");
  log.num_pages = uint32Of(info[2], "pages");
  auto bitmap = bytesOf(info[3], "bitmap");
  uint64_t needed = bitmapSize(log.num_pages);
  if (bitmap.length < needed) {
    throw Napi::RangeError::New(info.Env(), "Expected at least " + std::to_string(needed) + " bytes for bitmap");
  }
  log.dirty_bitmap = bitmap.data;
  return done(info, ioctlRetry(fd(info.Env()), KVM_CLEAR_DIRTY_LOG, &log), "KVM_CLEAR_DIRTY_LOG");
}

Napi::Value Vm::setTssAddr(const Napi::CallbackInfo& info) {
  return done(info, ioctlRetry(fd(info.Env()), KVM_SET_TSS_ADDR, uint64Of(info[0], "address")), "KVM_SET_TSS_ADDR");
}

Napi::Value Vm::setIdentityMapAddr(const Napi::CallbackInfo& info) {
  uint64_t address = uint64Of(info[0], "address");
  return done(info, ioctlRetry(fd(info.Env()), KVM_SET_IDENTITY_MAP_ADDR, &address), "KVM_SET_IDENTITY_MAP_ADDR");
}

Napi::Value Vm::setBootCpuId(const Napi::CallbackInfo& info) {
  return done(info, ioctlRetry(fd(info.Env()), KVM_SET_BOOT_CPU_ID, uint64Of(info[0], "id")), "KVM_SET_BOOT_CPU_ID");
}

Napi::Value Vm::createVcpu(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int vcpu = ioctlRetry(fd(env), KVM_CREATE_VCPU, static_cast<unsigned long>(uint32Of(info[0], "id")));
  if (vcpu < 0) throwErrno(env, "KVM_CREATE_VCPU");
  auto vm = Napi::External<std::shared_ptr<VmState>>::New(env, &state_);
  return addonOf(env).vcpuClass.New(
      {Napi::Number::New(env, vcpu), Napi::Number::New(env, static_cast<double>(vcpuMapSize_)), vm});
}

Napi::Value Vm::createIrqchip(const Napi::CallbackInfo& info) {
  return done(info, ioctlRetry(fd(info.Env()), KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
}

Napi::Value Vm::getIrqchip(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_irqchip>(info, KVM_GET_IRQCHIP, "KVM_GET_IRQCHIP");
}

Napi::Value Vm::setIrqchip(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_irqchip>(info, KVM_SET_IRQCHIP, "KVM_SET_IRQCHIP");
}

Napi::Value Vm::createPit2(const Napi::CallbackInfo& info) {
  kvm_pit_config config = {};
  config.flags = uint32Of(info[0], "flags");
  return done(info, ioctlRetry(fd(info.Env()), KVM_CREATE_PIT2, &config), "KVM_CREATE_PIT2");
}

Napi::Value Vm::getPit2(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_pit_state2>(info, KVM_GET_PIT2, "KVM_GET_PIT2");
}

Napi::Value Vm::setPit2(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_pit_state2>(info, KVM_SET_PIT2, "KVM_SET_PIT2");
}

Napi::Value Vm::irqLine(const Napi::CallbackInfo& info) {
  kvm_irq_level level = {};
  level.irq = uint32Of(info[0], "gsi");
  level.level = uint32Of(info[1], "level");
  return done(info, ioctlRetry(fd(info.Env()), KVM_IRQ_LINE, &level), "KVM_IRQ_LINE");
}

// setGsiRouting(entries): `struct kvm_irq_routing_entry`, one after the other.
Napi::Value Vm::setGsiRouting(const Napi::CallbackInfo& info) {
  auto entries = bytesOf(info[0], "entries");
  std::vector<uint8_t> buffer(sizeof(kvm_irq_routing) + entries.length);
  auto* routing = reinterpret_cast<kvm_irq_routing*>(buffer.data());
  routing->nr = entries.length / sizeof(kvm_irq_routing_entry);
  std::memcpy(routing->entries, entries.data, routing->nr * sizeof(kvm_irq_routing_entry));
  return done(info, ioctlRetry(fd(info.Env()), KVM_SET_GSI_ROUTING, routing), "KVM_SET_GSI_ROUTING");
}

Napi::Value Vm::signalMsi(const Napi::CallbackInfo& info) {
  int delivered = ioctlRetry(fd(info.Env()), KVM_SIGNAL_MSI, structOf(info[0], sizeof(kvm_msi), "KVM_SIGNAL_MSI"));
  // KVM says -1, which arrives as EPERM, where no local APIC has the address: the guest's doing, and no failure.
  if (delivered < 0 && errno != EPERM) throwErrno(info.Env(), "KVM_SIGNAL_MSI");
  return Napi::Number::New(info.Env(), std::max(delivered, 0));
}

// irqfd(fd, gsi, flags, resampleFd)
Napi::Value Vm::irqfd(const Napi::CallbackInfo& info) {
  kvm_irqfd request = {};
  request.fd = uint32Of(info[0], "fd");
  request.gsi = uint32Of(info[1], "gsi");
  request.flags = uint32Of(info[2], "flags");
  request.resamplefd = uint32Of(info[3], "resampleFd");
  return done(info, ioctlRetry(fd(info.Env()), KVM_IRQFD, &request), "KVM_IRQFD");
}

// ioeventfd(fd, address, length, flags, datamatch)
Napi::Value Vm::ioeventfd(const Napi::CallbackInfo& info) {
  kvm_ioeventfd request = {};
  request.fd = static_cast<int>(uint32Of(info[0], "fd"));
  request.addr = uint64Of(info[1], "address");
  request.len = uint32Of(info[2], "length");
  request.flags = uint32Of(info[3], "flags");
  request.datamatch = uint64Of(info[4], "datamatch");
  return done(info, ioctlRetry(fd(info.Env()), KVM_IOEVENTFD, &request), "KVM_IOEVENTFD");
}

// coalescedZone(register, address, size, pio)
Napi::Value Vm::coalescedZone(const Napi::CallbackInfo& info) {
  kvm_coalesced_mmio_zone zone = {};
  bool add = info[0].ToBoolean();
  zone.addr = uint64Of(info[1], "address");
  zone.size = uint32Of(info[2], "size");
  zone.pio = info[3].ToBoolean() ? 1 : 0;
  return done(info, ioctlRetry(fd(info.Env()), add ? KVM_REGISTER_COALESCED_MMIO : KVM_UNREGISTER_COALESCED_MMIO, &zone),
              add ? "KVM_REGISTER_COALESCED_MMIO" : "KVM_UNREGISTER_COALESCED_MMIO");
}

Napi::Value Vm::getClock(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_clock_data>(info, KVM_GET_CLOCK, "KVM_GET_CLOCK");
}

Napi::Value Vm::setClock(const Napi::CallbackInfo& info) {
  return structIoctl<kvm_clock_data>(info, KVM_SET_CLOCK, "KVM_SET_CLOCK");
}

Napi::Value Vm::close(const Napi::CallbackInfo& info) {
  state_.reset();
  return info.Env().Undefined();
}
