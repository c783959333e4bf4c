// The device's memory. Its addresses fault when the host reads them: a piece is a mapping twice as long as needed, whose
// first half nobody may read and is what tensors carry, and whose second half holds the bytes. Fresh memory is 0xFF, which
// is NaN in every floating type; what was freed is handed out again at once.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <sys/mman.h>

#include <unordered_map>
#include <vector>

#include "counting.h"

constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr int MOST_DEVICES = 16;
constexpr long PAGE = 4096;

struct Piece {
    char* base;
    size_t span;  // from the address that faults to the bytes
    size_t bytes;
    c10::DeviceIndex device;
};

static c10::DeviceIndex current_device = 0, device_count = 1;
static std::mutex memory_lock;
static std::unordered_map<size_t, std::vector<char*>> free_pieces;
static long allocated[MOST_DEVICES], peak[MOST_DEVICES], memory_limit = 0;

static void release(void* context) {
    auto* piece = static_cast<Piece*>(context);
    std::lock_guard<std::mutex> guard(memory_lock);
    allocated[piece->device] -= piece->bytes;
    free_pieces[piece->span].push_back(piece->base);
    delete piece;
}

static char* piece_of(size_t span, size_t bytes) {
    std::lock_guard<std::mutex> guard(memory_lock);
    TORCH_CHECK_WITH(OutOfMemoryError, !memory_limit || allocated[current_device] + (long)bytes <= memory_limit,
                     "Simulated device out of memory. Tried to allocate ", bytes, " bytes.");
    allocated[current_device] += bytes;
    peak[current_device] = std::max(peak[current_device], allocated[current_device]);
    auto& spare = free_pieces[span];
    if (!spare.empty()) {
        char* base = spare.back();
        spare.pop_back();
        return base;
    }
    void* base = mmap(nullptr, 2 * span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(base != MAP_FAILED, "no memory to simulate a device's");
    mprotect(base, span, PROT_NONE);
    return static_cast<char*>(base);
}

struct SimAllocator final : c10::DeviceAllocator {
    c10::DataPtr allocate(size_t bytes) override {
        c10::Device device(kSim, current_device);
        if (!bytes) return {nullptr, nullptr, &release, device};
        size_t span = (bytes + PAGE - 1) / PAGE * PAGE;
        char* base = piece_of(span, bytes);
        memset(base + span, 0xFF, bytes);
        return {base, new Piece{base, span, bytes, current_device}, &release, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void*, const void*, std::size_t) const override { TORCH_CHECK(false, "copy_data is not simulated"); }
    bool initialized() override { return true; }
    void emptyCache(c10::MempoolId_t) override {}
    void recordStream(const c10::DataPtr&, c10::Stream) override {}
    c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
        c10::CachingDeviceAllocator::DeviceStats stats;
        for (auto* stat : {&stats.allocated_bytes[0], &stats.reserved_bytes[0]}) {
            stat->current = allocated[device];
            stat->peak = peak[device];
        }
        return stats;
    }
    void resetAccumulatedStats(c10::DeviceIndex) override {}
    void resetPeakStats(c10::DeviceIndex device) override { peak[device] = allocated[device]; }
    std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
        size_t all = memory_limit ? memory_limit : 80l << 30;
        return {all - allocated[device], all};
    }
};
static SimAllocator allocator;
REGISTER_ALLOCATOR(kSim, &allocator);

// The same bytes as a CPU tensor that shares them: for the simulation alone.
static at::Tensor on_host(const at::Tensor& tensor) {
    if (!tensor.device().is_privateuseone()) return tensor;
    auto options = tensor.options().device(at::kCPU).requires_grad(false);
    auto* piece = static_cast<Piece*>(tensor.storage().data_ptr().get_context());
    if (!piece || !tensor.numel()) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
    char* address = piece->base + piece->span + tensor.storage_offset() * tensor.element_size();
    auto keep = tensor.storage();
    auto alias = at::from_blob(address, tensor.sizes(), tensor.strides(), [keep](void*) {}, options);
    if (tensor.is_conj()) alias._set_conj(true);
    if (tensor.is_neg()) alias._set_neg(true);
    return alias;
}
