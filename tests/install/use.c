// A program that links the installed library. It has no ggml, so registration must refuse, with a code, and not end the program.
#include <squeeze.h>
#include <stdio.h>

int main(void) {
    SqzStats stats = {0};
    sqz_stats(&stats);
    int32_t code = sqz_register();
    printf("register %d, sparse %llu\n", (int)code, (unsigned long long)stats.nodes_sparse);
    return code == 0 || stats.nodes_sparse != 0;
}
