// Messages are files in shared memory, one each, written under another name and renamed when they are complete.
#include "hccl.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { PATH_BYTES = 320 };

// ASCEND_SIMULATOR_SHARED names the folder; `ascend-sim run` makes one for each run and removes it at its end.
static const char *folder(void) {
    const char *chosen = getenv("ASCEND_SIMULATOR_SHARED");
    return chosen ? chosen : "/dev/shm";
}

static void message_path(char *path, const struct communicator *comm, uint32_t from, uint32_t to, uint64_t number) {
    snprintf(path, PATH_BYTES, "%s/%s.%u.%u.%llu", folder(), comm->name, from, to, (unsigned long long)number);
}

hccl_status send_message(struct communicator *comm, uint32_t to, const void *data, size_t size) {
    if (to >= comm->num_ranks) return HCCL_PARAMETER;
    char path[PATH_BYTES], unfinished[PATH_BYTES + 8];
    message_path(path, comm, comm->rank, to, comm->sent[to]++);
    snprintf(unfinished, sizeof unfinished, "%s.part", path);
    FILE *file = fopen(unfinished, "wb");
    if (!file) return HCCL_INTERNAL;
    size_t written = size ? fwrite(data, 1, size, file) : 0;
    if (fclose(file) != 0 || written != size || rename(unfinished, path) != 0) {
        fprintf(stderr, "ascend simulator: could not leave %zu bytes in %s\n", size, folder());
        return HCCL_MEMORY;
    }
    return HCCL_OK;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

// HCCL's own setting; a shorter default than its 1836 s, since here nothing is slow.
static double timeout(void) {
    const char *text = getenv("HCCL_EXEC_TIMEOUT");
    double chosen = text ? atof(text) : 0;
    return chosen > 0 ? chosen : 300;
}

hccl_status receive_message(struct communicator *comm, uint32_t from, void *data, size_t size) {
    if (from >= comm->num_ranks) return HCCL_PARAMETER;
    char path[PATH_BYTES];
    message_path(path, comm, from, comm->rank, comm->received[from]++);
    double deadline = seconds() + timeout();
    FILE *file;
    // The wait between looks grows, so that many waiting ranks leave the processor to the one they wait for.
    useconds_t pause = 20;
    while (!(file = fopen(path, "rb"))) {
        if (errno != ENOENT) return HCCL_INTERNAL;
        if (seconds() > deadline) {
            fprintf(stderr, "ascend simulator: rank %u waited %.0f s for rank %u\n", comm->rank, timeout(), from);
            return HCCL_TIMEOUT;
        }
        usleep(pause);
        if (pause < 1000) pause *= 2;
    }
    size_t got = size ? fread(data, 1, size, file) : 0;
    int more = fgetc(file) != EOF;
    fclose(file);
    unlink(path);
    if (got != size || more) {
        fprintf(stderr, "ascend simulator: rank %u expected %zu bytes from rank %u, which sent %s\n", comm->rank, size,
                from, more ? "more" : "fewer");
        return HCCL_PARAMETER;
    }
    return HCCL_OK;
}
