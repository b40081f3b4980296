package port

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestFindPort(t *testing.T) {
	dir := t.TempDir()
	for node, name := range map[string]string{"vport0p0": "console\n", "vport0p1": "agent\n", "vport1p1": ""} {
		if err := os.MkdirAll(filepath.Join(dir, node), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, node, "name"), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := findPort(dir, "agent"); got != "vport0p1" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := findPort(dir, "other"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %q, %v", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := OpenDevice(ctx, "no such port"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("open: %v", err)
	}
}

// socketDevice is a virtioPort on one end of a socket pair, which behaves as
// the port does but for the host's coming back.
func socketDevice(t *testing.T) (Device, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	d, err := newVirtioPort(fds[0], "test")
	if err != nil {
		t.Fatal(err)
	}
	peer := os.NewFile(uintptr(fds[1]), "peer")
	t.Cleanup(func() {
		d.Close()
		peer.Close()
	})
	return d, peer
}

func TestDeviceReads(t *testing.T) {
	d, peer := socketDevice(t)
	go peer.Write([]byte("abc"))
	b := make([]byte, 8)
	if n, err := d.Read(b, false); n != 3 || err != nil {
		t.Fatalf("read %d, %v", n, err)
	}
	peer.Close()
	if n, err := d.Read(b, false); n != 0 || err != io.EOF {
		t.Fatalf("read with nobody there: %d, %v; want EOF", n, err)
	}
	// Waiting for somebody ends with the deadline only.
	done := make(chan error, 1)
	go func() {
		_, err := d.Read(b, true)
		done <- err
	}()
	if err := d.SetDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !interrupted(err) {
		t.Fatalf("got %v, want a deadline", err)
	}
	if err := d.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if n, err := d.Read(b, false); err != io.EOF {
		t.Fatalf("read after the deadline was lifted: %d, %v", n, err)
	}
}

func TestDeviceWriteEnds(t *testing.T) {
	d, peer := socketDevice(t)
	done := make(chan error, 1)
	go func() {
		_, err := d.Write(make([]byte, 64<<20)) // more than any buffer
		done <- err
	}()
	if _, err := io.ReadFull(peer, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	peer.Close()
	if err := <-done; err == nil {
		t.Fatal("wrote 64 MiB to nobody")
	}

	d, _ = socketDevice(t)
	go func() {
		_, err := d.Write(make([]byte, 64<<20))
		done <- err
	}()
	if err := d.SetDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !interrupted(err) {
		t.Fatalf("got %v, want a deadline", err)
	}
}
