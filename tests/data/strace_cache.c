#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
static char buf[300000];
static void *reader(void *name) {
  int fd = open(name, O_RDONLY);
  for (int i = 0; i < 4; i++) pread(fd, buf, 4096, i * 65536L);
  close(fd);
  return 0;
}
int main(void) {
  int fd = open("block0.tmp", O_CREAT | O_RDWR | O_TRUNC, 0600);
  write(fd, buf, 200000); write(fd, buf, 100000);
  rename("block0.tmp", "block0");
  lseek(fd, 131072, SEEK_SET); read(fd, buf, 10);
  pthread_t a, b;
  pthread_create(&a, 0, reader, "block0"); pthread_create(&b, 0, reader, "block0");
  pthread_join(a, 0); pthread_join(b, 0);
  if (!fork()) { read(fd, buf, 10); _exit(0); }
  wait(0);
  read(fd, buf, 10);
  struct iovec v[2] = {{buf, 70000}, {buf, 70000}};
  preadv(fd, v, 2, 0);
  int log = open("log, a) = 1", O_CREAT | O_WRONLY | O_APPEND, 0600);
  write(log, "one) = 5", 8); write(log, "two", 3);
  close(log);
  log = open("log, a) = 1", O_WRONLY | O_APPEND); write(log, "three", 5);
  int copy = open("copy", O_CREAT | O_RDWR, 0600);
  off_t at = 65536; sendfile(copy, fd, &at, 65536); copy_file_range(fd, 0, copy, 0, 1000, 0);
  close(copy);
  unlink("block0");
  pread(fd, buf, 100, 0);
  close(fd);
  fd = open("block0", O_CREAT | O_RDWR, 0600); pwrite(fd, buf, 50, 0); close(fd);
  fd = open("block0", O_RDWR | O_TRUNC); write(fd, buf, 5); read(fd, buf, 5);
  int other = dup(fd); lseek(other, 0, SEEK_SET); read(fd, buf, 5); close(fd); close(other);
  open("missing", O_RDONLY);
  unlink("block0");
  return 0;
}
