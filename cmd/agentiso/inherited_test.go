package main

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestInheritedFilesStayHere(t *testing.T) {
	fd, err := unix.Dup(int(os.Stdin.Fd())) // without close-on-exec, as a shell passes one on
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.CloseRange(uint(fd), uint(fd), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		t.Skip("missing capability: close_range with CLOSE_RANGE_CLOEXEC (Linux 5.11)")
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
		t.Fatal(err)
	}
	keepInherited()
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags of an inherited file: %#x, %v; want close-on-exec", flags, err)
	}
}
