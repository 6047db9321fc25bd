/* A CUDA driver that runs nothing: it lets the compiler ask which chip it compiles for, and be told an H100.
   Each function has the name and the arguments of the driver's own; 0 means success. */
#include <stdio.h>
#include <string.h>

typedef int result;

static int nothing; /* what handles point to */

result cuInit(unsigned flags) { return 0; }
result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
result cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
result cuDeviceGetCount(int *count) { *count = 1; return 0; }
result cuDeviceGetName(char *name, int length, int device) { strncpy(name, "stub", length); return 0; }
result cuCtxGetCurrent(void **context) { *context = &nothing; return 0; }
result cuCtxSetCurrent(void *context) { return 0; }
result cuCtxGetDevice(int *device) { *device = 0; return 0; }
result cuModuleLoadData(void **module, const void *image) { *module = &nothing; return 0; }
result cuModuleGetFunction(void **function, void *module, const char *name) { *function = &nothing; return 0; }
result cuGetErrorName(int error, const char **name) { *name = "stub"; return 0; }
result cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }

result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = 132; break;    /* multiprocessors */
    case 75: *value = 9; break;      /* compute capability, major */
    case 76: *value = 0; break;      /* and minor */
    case 97: *value = 232448; break; /* bytes of shared memory that a block may ask for */
    default: *value = 0;
  }
  return 0;
}

/* Attribute 8 is the shared memory that a kernel asks for at its launch: compile-time output of interest. */
result cuFuncSetAttribute(void *function, int attribute, int value) {
  if (attribute == 8) fprintf(stderr, "dynamic shared memory: %d\n", value);
  return 0;
}
