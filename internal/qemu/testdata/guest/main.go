// Command guest is PID 1 of the machines that the tests of package qemu boot.
// It says "qtest: up" on the console and obeys single lines on the virtio
// port "agent"; each is answered "ok LINE" before it is carried out.
package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	for _, m := range [][3]string{{"proc", "/proc", "proc"}, {"sys", "/sys", "sysfs"}, {"dev", "/dev", "devtmpfs"}} {
		os.MkdirAll(m[1], 0o755)
		syscall.Mount(m[0], m[1], m[2], 0, "")
	}
	fmt.Println("qtest: up")
	if cmdline, _ := os.ReadFile("/proc/cmdline"); bytes.Contains(cmdline, []byte("qtest=mute")) {
		select {}
	}
	var port *os.File
	for port == nil {
		p, err := openPort()
		if err != nil {
			fmt.Println("qtest:", err)
			time.Sleep(20 * time.Millisecond)
		}
		port = p
	}
	r := bufio.NewReader(port)
	for {
		line, err := r.ReadString('\n')
		if err != nil { // nobody is connected; half a line means nothing to the next
			r.Reset(port)
			time.Sleep(10 * time.Millisecond)
			continue
		}
		line = strings.TrimSpace(line)
		fmt.Fprintf(port, "ok %s\n", line)
		obey(line)
	}
}

func obey(line string) {
	switch line {
	case "say":
		fmt.Println("qtest: said")
	case "flood":
		chunk := bytes.Repeat([]byte("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcd\r\n"), 64)
		for range 192 << 10 / len(chunk) {
			os.Stdout.Write(chunk)
		}
		fmt.Println("qtest: flooded")
	case "hostile":
		os.Stdout.Write([]byte("\x00\x1b]0;owned\x07\x1b[2J\xff\xfe\r\r\n\x1b[31mred"))
		fmt.Println("qtest: was hostile")
	case "panic": // the end of PID 1 is a panic of the kernel
		os.Exit(3)
	case "reboot":
		syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	case "fill":
		disk, err := os.OpenFile("/dev/vda", os.O_WRONLY|syscall.O_SYNC, 0)
		if err == nil {
			_, err = disk.Write(bytes.Repeat([]byte("full"), 1<<20))
		}
		fmt.Println("qtest: filled", err)
	case "cpus":
		b, _ := os.ReadFile("/sys/devices/system/cpu/online")
		fmt.Printf("qtest: cpus %s", b)
	case "devices":
		devs, _ := filepath.Glob("/sys/bus/virtio/devices/*/device")
		for _, d := range devs {
			b, _ := os.ReadFile(d)
			fmt.Printf("qtest: device %s %s", filepath.Base(filepath.Dir(d)), b)
		}
	}
}

func openPort() (*os.File, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		if b, _ := os.ReadFile(n); strings.TrimSpace(string(b)) == "agent" {
			fd, err := syscall.Open("/dev/"+filepath.Base(filepath.Dir(n)), syscall.O_RDWR, 0)
			if err != nil {
				return nil, err
			}
			return os.NewFile(uintptr(fd), "port"), nil
		}
	}
	return nil, fmt.Errorf("no port named agent among %v", names)
}
