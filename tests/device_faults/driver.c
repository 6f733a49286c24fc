// A CUDA driver without a GPU: device memory is host memory, kernels do nothing, and calls fail as control.h says.
// Calls that give something back always do so, whatever they answer.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uintptr_t address;

#include "control.h"

static int live;

// What was made and not given back.
int made_up_live(void) { return live; }

#define answer() answer_of(__func__)
#define ANSWER do { int code = answer(); if (code) return code; } while (0)
#define make(out, bytes) make_of(__func__, out, bytes)
#define give_back(what) give_back_of(__func__, what)

static int make_of(const char * name, void ** out, size_t bytes) {
    int code = answer_of(name);
    if (code) return code;
    *out = calloc(1, bytes ? bytes : 1);
    live++;
    return 0;
}
static int give_back_of(const char * name, void * what) {
    free(what);
    live -= what != NULL;
    return answer_of(name);
}

int cuInit(unsigned flags) { (void)flags; return answer(); }
int cuDriverGetVersion(int * version) { *version = 13000; return answer(); }
int cuGetErrorName(int code, const char ** text) { (void)code; *text = "CUDA_ERROR_MADE_UP"; return 0; }
int cuGetErrorString(int code, const char ** text) { *text = code == 2 ? "out of memory" : "made up"; return 0; }
int cuDeviceGetCount(int * n) { *n = 1; return answer(); }
int cuDeviceGet(int * device, int ordinal) { *device = ordinal; return answer(); }
int cuDeviceGetByPCIBusId(int * device, const char * id) { (void)id; *device = 0; return answer(); }
int cuDeviceGetName(char * name, int size, int device) { (void)device; snprintf(name, size, "Made-up GPU"); return answer(); }
int cuDeviceGetAttribute(int * value, int attribute, int device) {
    (void)device;
    switch (attribute) {
        case 16: *value = 132; break;  // multiprocessors
        case 75: *value = 9; break;    // compute capability
        case 76: *value = 0; break;
        case 97: *value = 232448; break;  // shared memory of a block that asks for it
        default: *value = 1;
    }
    return answer();
}
int cuDevicePrimaryCtxRetain(void ** context, int device) { (void)device; return make(context, 1); }
// Its handle is a number of the device: the last one made.
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; live--; return answer(); }
int cuCtxSetCurrent(void * context) { (void)context; return answer(); }
int cuCtxSynchronize(void) { return answer(); }

int cuModuleLoadData(void ** module, const void * image) { (void)image; return make(module, 1); }
int cuModuleUnload(void * module) { return give_back(module); }
int cuModuleGetFunction(void ** function, void * module, const char * name) {
    (void)name;
    *function = module;
    return answer();
}
int cuFuncGetAttribute(int * value, int attribute, void * function) {
    (void)function;
    *value = attribute == 5 ? 90 : 0;  // the PTX version
    return answer();
}
int cuFuncSetAttribute(void * function, int attribute, int value) { (void)function; (void)attribute; (void)value; return answer(); }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int * n, void * function, int threads, size_t shared) {
    (void)function; (void)threads; (void)shared;
    *n = 2;
    return answer();
}
int cuLaunchKernelEx(const void * config, void * function, void ** parameters, void ** extra) {
    (void)config; (void)function; (void)parameters; (void)extra;
    return answer();
}

int cuMemAlloc_v2(address * at, size_t bytes) { return make((void **)at, bytes); }
int cuMemFree_v2(address at) { return give_back((void *)at); }
int cuMemHostAlloc(void ** at, size_t bytes, unsigned flags) { (void)flags; return make(at, bytes); }
int cuMemFreeHost(void * at) { return give_back(at); }
int cuMemGetInfo_v2(size_t * free_bytes, size_t * all) { *free_bytes = 12345; *all = 1 << 30; return answer(); }
int cuMemcpyHtoD_v2(address to, const void * from, size_t n) { ANSWER; memcpy((void *)to, from, n); return 0; }
int cuMemcpyDtoH_v2(void * to, address from, size_t n) { ANSWER; memcpy(to, (void *)from, n); return 0; }
int cuMemcpyDtoHAsync_v2(void * to, address from, size_t n, void * stream) { (void)stream; return cuMemcpyDtoH_v2(to, from, n); }
int cuMemcpyDtoDAsync_v2(address to, address from, size_t n, void * stream) {
    (void)stream;
    ANSWER;
    memmove((void *)to, (void *)from, n);
    return 0;
}
// As in cuda.h.
struct copy_2d {
    size_t from_x, from_y;
    int from_kind;
    const void * from_host;
    address from_device;
    void * from_array;
    size_t from_step, to_x, to_y;
    int to_kind;
    void * to_host;
    address to_device;
    void * to_array;
    size_t to_step, width, height;
};
int cuMemcpy2DAsync_v2(const struct copy_2d * c, void * stream) {
    (void)stream;
    ANSWER;
    for (size_t i = 0; i < c->height; i++)
        memcpy((char *)c->to_host + i * c->to_step, (char *)c->from_device + i * c->from_step, c->width);
    return 0;
}
int cuPointerGetAttribute(void * value, int attribute, address at) {
    (void)at;
    *(int *)value = attribute == 2 ? 2 : 0;  // memory type: a device's; ordinal
    return answer();
}
int cuMemsetD8Async(address to, unsigned char value, size_t n, void * stream) {
    (void)stream;
    ANSWER;
    memset((void *)to, value, n);
    return 0;
}
int cuMemsetD32Async(address to, unsigned value, size_t n, void * stream) {
    (void)stream;
    ANSWER;
    for (size_t i = 0; i < n; i++) ((unsigned *)to)[i] = value;
    return 0;
}

int cuStreamCreate(void ** stream, unsigned flags) { (void)flags; return make(stream, 1); }
int cuStreamDestroy_v2(void * stream) { return give_back(stream); }
int cuStreamSynchronize(void * stream) { (void)stream; return answer(); }
int cuStreamWaitEvent(void * stream, void * event, unsigned flags) { (void)stream; (void)event; (void)flags; return answer(); }
int cuStreamBeginCapture_v2(void * stream, int mode) { (void)stream; (void)mode; return answer(); }
int cuStreamEndCapture(void * stream, void ** graph) { (void)stream; return make(graph, 1); }
int cuEventCreate(void ** event, unsigned flags) { (void)flags; return make(event, 1); }
int cuEventDestroy_v2(void * event) { return give_back(event); }
int cuEventRecord(void * event, void * stream) { (void)event; (void)stream; return answer(); }
int cuEventQuery(void * event) { (void)event; return answer(); }
int cuGraphInstantiateWithFlags(void ** exec, void * graph, unsigned long long flags) { (void)graph; (void)flags; return make(exec, 1); }
int cuGraphLaunch(void * exec, void * stream) { (void)exec; (void)stream; return answer(); }
int cuGraphDestroy(void * graph) { return give_back(graph); }
int cuGraphExecDestroy(void * exec) { return give_back(exec); }
