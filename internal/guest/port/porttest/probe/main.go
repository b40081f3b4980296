// Command probe is the smallest guest that can stand at the other end of the
// link: PID 1 of an initrd with nothing else in it. It serves what the vm
// tests of package link ask for over the serial port, and over vsock if the
// kernel command line has probe.vsock.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/guest/port"
	"github.com/agentiso/agentiso/internal/link/wire"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("probe:", err)
	}
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		fmt.Println("probe: reboot:", err)
	}
}

func run() error {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"sysfs", "/sys"}, {"proc", "/proc"}} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	log := slog.New(slog.NewTextHandler(os.Stdout, nil))
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	var l net.Listener
	if strings.Contains(string(cmdline), "probe.vsock") {
		l, err = port.ListenVsock(context.Background(), port.VsockOptions{Options: port.Options{Log: log}})
	} else {
		l, err = port.ListenSerial(context.Background(), wire.PortName, port.Options{Log: log})
	}
	if err != nil {
		return err
	}
	return http.Serve(l, handler())
}

func handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET /goroutines", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, runtime.NumGoroutine())
	})
	mux.HandleFunc("POST /upload", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r.Body, make([]byte, 256<<10))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprint(w, n)
	})
	mux.HandleFunc("GET /download", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.ParseInt(r.URL.Query().Get("n"), 10, 64)
		piece, _ := strconv.Atoi(r.URL.Query().Get("piece"))
		buf := make([]byte, max(piece, 1))
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		for n > 0 {
			m, err := w.Write(buf[:min(int64(len(buf)), n)])
			if err != nil {
				return
			}
			n -= int64(m)
		}
	})
	return mux
}
