// Device memory is host memory, counted for each device against a limit.
#include "simulator.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// Every block is preceded by this, padded to the alignment that torch_npu's allocator asks of a device.
struct block {
    size_t size;
    int device;
};
enum { ALIGNMENT = 512 };

// A reserved address range; memory is counted when it is mapped.
struct range {
    char *start;
    size_t size;
    struct range *next;
};
// Memory mapped into such a range.
struct mapping {
    char *start;
    size_t size;
    int device;
    struct mapping *next;
};
// Physical memory that expandable segments ask for before they map it.
struct physical {
    size_t size;
    int device;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used[MAX_DEVICES];
static struct range *ranges;
static struct mapping *mappings;

static size_t limit(void) {
    const char *text = getenv("ASCEND_SIMULATOR_MEMORY_BYTES");
    return text ? strtoull(text, NULL, 10) : 64ull << 30;
}

// Counts `size` bytes on `device`, or refuses.
static acl_status take(int device, size_t size) {
    pthread_mutex_lock(&lock);
    size_t free_bytes = limit() > used[device] ? limit() - used[device] : 0;
    acl_status status = ACL_OK;
    if (size <= free_bytes)
        used[device] += size;
    else
        status = simulator_fail(ACL_OUT_OF_MEMORY, "ascend simulator: device %d has %zu of %zu bytes free, not %zu",
                                device, free_bytes, limit(), size);
    pthread_mutex_unlock(&lock);
    return status;
}

static void give_back(int device, size_t size) {
    pthread_mutex_lock(&lock);
    used[device] -= size;
    pthread_mutex_unlock(&lock);
}

acl_status aclrtMalloc(void **pointer, size_t size, int policy) {
    (void)policy;
    int device = simulator_current_device();
    if (device < 0) return ACL_NO_CONTEXT;
    acl_status status = take(device, size);
    if (status) return status;
    char *base = aligned_alloc(ALIGNMENT, (size + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (!base) {
        give_back(device, size);
        return simulator_fail(ACL_OUT_OF_MEMORY, "ascend simulator: the host has no %zu bytes", size);
    }
    *(struct block *)base = (struct block){size, device};
    *pointer = base + ALIGNMENT;
    return ACL_OK;
}

acl_status aclrtMallocAlign32(void **pointer, size_t size, int policy) { return aclrtMalloc(pointer, size, policy); }

acl_status aclrtFree(void *pointer) {
    if (!pointer) return ACL_INVALID_PARAMETER;
    char *base = (char *)pointer - ALIGNMENT;
    struct block block = *(struct block *)base;
    give_back(block.device, block.size);
    free(base);
    return ACL_OK;
}

acl_status aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total) {
    (void)kind;
    int device = simulator_current_device();
    if (device < 0) return ACL_NO_CONTEXT;
    pthread_mutex_lock(&lock);
    *total = limit();
    *free_bytes = *total > used[device] ? *total - used[device] : 0;
    pthread_mutex_unlock(&lock);
    return ACL_OK;
}

acl_status aclrtMallocHost(void **pointer, size_t size) {
    *pointer = aligned_alloc(64, (size + 64) / 64 * 64);
    return *pointer ? ACL_OK : ACL_OUT_OF_MEMORY;
}

acl_status aclrtFreeHost(void *pointer) {
    free(pointer);
    return ACL_OK;
}

acl_status aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) {
    (void)kind;
    if (size > room)
        return simulator_fail(ACL_INVALID_PARAMETER, "ascend simulator: a copy of %zu bytes into %zu", size, room);
    memmove(to, from, size);
    return ACL_OK;
}

acl_status aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    (void)stream;
    return aclrtMemcpy(to, room, from, size, kind);
}

acl_status aclrtMemset(void *to, size_t room, int32_t value, size_t size) {
    if (size > room)
        return simulator_fail(ACL_INVALID_PARAMETER, "ascend simulator: %zu bytes set in %zu", size, room);
    memset(to, value, size);
    return ACL_OK;
}

acl_status aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t size, void *stream) {
    (void)stream;
    return aclrtMemset(to, room, value, size);
}

// Expandable segments: an address range is reserved once, and memory is mapped into it piece by piece.

acl_status aclrtReserveMemAddress(void **pointer, size_t size, size_t alignment, void *expected, uint64_t flags) {
    (void)alignment, (void)expected, (void)flags;
    void *start = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct range *range = malloc(sizeof *range);
    if (start == MAP_FAILED || !range) return ACL_OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    *range = (struct range){start, size, ranges};
    ranges = range;
    pthread_mutex_unlock(&lock);
    *pointer = start;
    return ACL_OK;
}

acl_status aclrtReleaseMemAddress(void *pointer) {
    pthread_mutex_lock(&lock);
    struct range **link = &ranges;
    while (*link && (*link)->start != (char *)pointer) link = &(*link)->next;
    struct range *found = *link;
    if (found) *link = found->next;
    pthread_mutex_unlock(&lock);
    if (!found) return ACL_INVALID_PARAMETER;
    munmap(found->start, found->size);
    free(found);
    return ACL_OK;
}

// `properties` names a location, which for torch_npu is always the current device.
acl_status aclrtMallocPhysical(void **handle, size_t size, const void *properties, uint64_t flags) {
    (void)properties, (void)flags;
    int device = simulator_current_device();
    if (device < 0) return ACL_NO_CONTEXT;
    acl_status status = take(device, size);
    if (status) return status;
    struct physical *memory = malloc(sizeof *memory);
    if (!memory) return ACL_OUT_OF_MEMORY;
    *memory = (struct physical){size, device};
    *handle = memory;
    return ACL_OK;
}

acl_status aclrtFreePhysical(void *handle) {
    struct physical *memory = handle;
    give_back(memory->device, memory->size);
    free(memory);
    return ACL_OK;
}

acl_status aclrtMapMem(void *pointer, size_t size, size_t offset, void *handle, uint64_t flags) {
    (void)offset, (void)flags;
    struct mapping *mapping = malloc(sizeof *mapping);
    if (!mapping || mprotect(pointer, size, PROT_READ | PROT_WRITE)) return ACL_OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    *mapping = (struct mapping){pointer, size, ((struct physical *)handle)->device, mappings};
    mappings = mapping;
    pthread_mutex_unlock(&lock);
    return ACL_OK;
}

acl_status aclrtUnmapMem(void *pointer) {
    pthread_mutex_lock(&lock);
    struct mapping **link = &mappings;
    while (*link && (*link)->start != (char *)pointer) link = &(*link)->next;
    struct mapping *found = *link;
    if (found) *link = found->next;
    pthread_mutex_unlock(&lock);
    if (!found) return ACL_INVALID_PARAMETER;
    // A fresh mapping over the old one gives the pages back and keeps the addresses reserved.
    mmap(found->start, found->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    free(found);
    return ACL_OK;
}

// Memory shared between processes would have to be shared memory from the start.
#define NOT_SHARED(name)                                                                                  \
    acl_status name(void) {                                                                               \
        return simulator_fail(ACL_FEATURE_NOT_SUPPORTED, "ascend simulator: " #name                       \
                              " is not simulated: device memory cannot be shared between processes");     \
    }
NOT_SHARED(aclrtMemExportToShareableHandle)
NOT_SHARED(aclrtMemImportFromShareableHandle)
NOT_SHARED(aclrtMemSetPidToShareableHandle)
NOT_SHARED(aclrtIpcMemGetExportKey)
NOT_SHARED(aclrtIpcMemImportByKey)
