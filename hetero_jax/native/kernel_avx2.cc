#define LANES 8
#include "kernel.inc.h"
hetero::Kernel hetero::KernelAvx2() { return Run; }
