// What PyTorch asks of every kind of device: which one is current, its streams, its generator, growing a storage.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.h"

static c10::DeviceIndex exchange(c10::Device device) {
    auto before = current_device;
    if (device.has_index()) current_device = device.index();
    return before;
}

struct SimGuard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return kSim; }
    c10::Device exchangeDevice(c10::Device device) const override { return {kSim, exchange(device)}; }
    c10::Device getDevice() const override { return {kSim, current_device}; }
    void setDevice(c10::Device device) const override { exchange(device); }
    void uncheckedSetDevice(c10::Device device) const noexcept override { exchange(device); }
    c10::Stream getStream(c10::Device device) const override {
        return c10::Stream(c10::Stream::DEFAULT, {kSim, device.has_index() ? device.index() : current_device});
    }
    c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
    c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
    c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
    c10::DeviceIndex deviceCount() const noexcept override { return device_count; }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override {}
    void synchronizeDevice(const c10::DeviceIndex) const override {}
    void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
        *event = (void*)1;
    }
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, SimGuard);

static const at::Generator& device_generator() {
    static at::Generator generator = at::detail::createCPUGenerator(0);
    return generator;
}

struct SimHooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return device_count > 0; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return device_count; }
    void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
    c10::DeviceIndex getCurrentDevice() const override { return current_device; }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return exchange({kSim, device}); }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
        return device < 0 ? current_device : exchange({kSim, device});
    }
    at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
    const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return device_generator(); }
    at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(0); }
    void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
        auto* impl = storage.unsafeGetStorageImpl();
        const c10::DeviceGuard guard(impl->device());
        auto* before = static_cast<Piece*>(impl->data_ptr().get_context());
        auto fresh = allocator.allocate(bytes);
        if (before && bytes) {
            auto* piece = static_cast<Piece*>(fresh.get_context());
            memcpy(piece->base + piece->span, before->base + before->span, std::min(bytes, impl->nbytes()));
        }
        impl->set_data_ptr_noswap(std::move(fresh));
        impl->set_nbytes(bytes);
    }
};
static int hooks_are_registered = (at::RegisterPrivateUse1HooksInterface(new SimHooks()), 0);
