// The CUDA driver of this machine, but calls of whoever loads it by this file fail as control.h says: those are not made. What gives
// something back is done all the same, and so is the end of a capture. Linked libraries such as the CUDA runtime know the driver by
// another name and see none of this.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "control.h"

typedef uintptr_t word;
// Numbers and addresses only: further ones than a function has are not looked at.
typedef int (*any)(word, word, word, word, word, word, word, word);

static any real(const char * name) {
    void * driver = dlopen("libcuda.so.1", RTLD_NOW);
    any found = driver ? (any)dlsym(driver, name) : NULL;
    if (!found) {
        fprintf(stderr, "%s is not there\n", name);
        exit(1);
    }
    return found;
}

#define PARAMETERS word a, word b, word c, word d, word e, word f, word g, word h
#define OWN(name) \
    static any own; \
    if (!own) own = real(#name)
#define MAY_FAIL(name) \
    int name(PARAMETERS) { \
        OWN(name); \
        int code = answer_of(#name); \
        return code ? code : own(a, b, c, d, e, f, g, h); \
    }
#define IS_DONE(name) \
    int name(PARAMETERS) { \
        OWN(name); \
        int done = own(a, b, c, d, e, f, g, h), code = answer_of(#name); \
        return code ? code : done; \
    }
#define NEVER_FAILS(name) \
    int name(PARAMETERS) { \
        OWN(name); \
        return own(a, b, c, d, e, f, g, h); \
    }

NEVER_FAILS(cuGetErrorName)
NEVER_FAILS(cuGetErrorString)
MAY_FAIL(cuInit)
MAY_FAIL(cuDriverGetVersion)
MAY_FAIL(cuDeviceGetCount)
MAY_FAIL(cuDeviceGet)
MAY_FAIL(cuDeviceGetByPCIBusId)
MAY_FAIL(cuDeviceGetName)
MAY_FAIL(cuDeviceGetAttribute)
MAY_FAIL(cuDevicePrimaryCtxRetain)
MAY_FAIL(cuCtxSetCurrent)
MAY_FAIL(cuCtxSynchronize)
MAY_FAIL(cuModuleLoadData)
MAY_FAIL(cuModuleGetFunction)
MAY_FAIL(cuFuncGetAttribute)
MAY_FAIL(cuFuncSetAttribute)
MAY_FAIL(cuOccupancyMaxActiveBlocksPerMultiprocessor)
MAY_FAIL(cuLaunchKernelEx)
MAY_FAIL(cuMemAlloc_v2)
MAY_FAIL(cuMemHostAlloc)
MAY_FAIL(cuMemGetInfo_v2)
MAY_FAIL(cuMemcpyHtoD_v2)
MAY_FAIL(cuMemcpyDtoH_v2)
MAY_FAIL(cuMemcpyDtoHAsync_v2)
MAY_FAIL(cuMemcpyDtoDAsync_v2)
MAY_FAIL(cuMemcpy2DAsync_v2)
MAY_FAIL(cuPointerGetAttribute)
MAY_FAIL(cuMemsetD8Async)
MAY_FAIL(cuMemsetD32Async)
MAY_FAIL(cuStreamCreate)
MAY_FAIL(cuStreamSynchronize)
MAY_FAIL(cuStreamWaitEvent)
MAY_FAIL(cuStreamBeginCapture_v2)
MAY_FAIL(cuEventCreate)
MAY_FAIL(cuEventRecord)
MAY_FAIL(cuEventQuery)
MAY_FAIL(cuGraphInstantiateWithFlags)
MAY_FAIL(cuGraphLaunch)
IS_DONE(cuDevicePrimaryCtxRelease_v2)
IS_DONE(cuModuleUnload)
IS_DONE(cuMemFree_v2)
IS_DONE(cuMemFreeHost)
IS_DONE(cuStreamDestroy_v2)
IS_DONE(cuStreamEndCapture)
IS_DONE(cuEventDestroy_v2)
IS_DONE(cuGraphDestroy)
IS_DONE(cuGraphExecDestroy)
