package boot

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// sigRTMin is glibc's first real-time signal, which systemd counts from.
const sigRTMin = 34

// askInit asks the image's init, process 1, to end the machine. Where the
// kernel cannot power off it asks for a reboot: see endMachine.
func askInit() error {
	exe, _ := os.Readlink("/proc/1/exe")
	off := canPowerOff()
	switch {
	case exists("/run/systemd/system"):
		// systemd(1), signals: start poweroff.target or reboot.target.
		if off {
			return unix.Kill(1, syscall.Signal(sigRTMin+4))
		}
		return unix.Kill(1, syscall.Signal(sigRTMin+5))
	case exists("/run/openrc/init.ctl"):
		if off {
			return writeFIFO("/run/openrc/init.ctl", []byte("poweroff"))
		}
		return writeFIFO("/run/openrc/init.ctl", []byte("reboot"))
	case filepath.Base(exe) == "busybox":
		if off {
			return unix.Kill(1, unix.SIGUSR2)
		}
		return unix.Kill(1, unix.SIGTERM)
	}
	level := byte('6')
	if off {
		level = '0'
	}
	for _, fifo := range []string{"/run/initctl", "/dev/initctl"} {
		if exists(fifo) {
			return writeFIFO(fifo, runLevelRequest(level))
		}
	}
	return errors.New("process 1 is no init that takes requests")
}

// runLevelRequest is sysvinit's struct init_request (initreq.h): magic,
// command 1 (change run level), run level, seconds between TERM and KILL, and a
// union that pads it to 384 bytes.
func runLevelRequest(level byte) []byte {
	b := make([]byte, 384)
	binary.NativeEndian.PutUint32(b, 0x03091969)
	binary.NativeEndian.PutUint32(b[4:], 1)
	binary.NativeEndian.PutUint32(b[8:], uint32(level))
	binary.NativeEndian.PutUint32(b[12:], 3)
	return b
}

// writeFIFO writes b unless nobody reads, which open(2) reports as ENXIO.
func writeFIFO(path string, b []byte) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, b)
	return os.NewSyscallError("write", err)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
