package qemu

import (
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/agentiso/agentiso/internal/domain"
)

// The accelerators.
const (
	KVM = "kvm"
	TCG = "tcg"
)

// AgentPort is the name of the virtio-serial port that the guest's agent
// opens.
const AgentPort = "agent"

// maxCommandLine bounds what Args puts on the kernel command line. The x86
// kernel takes 2047 bytes, and QEMU adds some 45 for each virtio device.
const maxCommandLine = 1800

// sandbox is QEMU's seccomp filter with everything closed that it offers to
// close. All four work with QEMU 7.2 under TCG and with user networking; spawn=deny
// rules out helpers and network scripts, which are not used.
const sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// Launch is what one QEMU process needs beside its machine's specification.
type Launch struct {
	RunDir    string // also the process's mark in its command line
	Accel     string // KVM or TCG
	TBSizeMiB int    // TCG: translation cache
	TSCkHz    int64  // TCG: the host's time stamp counter; 0: unknown
	// Scratch: writes to the disk go to a temporary file that ends with the
	// process.
	Scratch bool

	// Inherited descriptors: three listening Unix sockets and, where the
	// machine has them, its open TAP and /dev/vhost-vsock.
	QMP, Console, Agent, TAP, Vsock int
}

// idPattern keeps ids fit to be file names and parts of a command line.
var idPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

// EffectiveCPUs is how many vCPUs a machine gets that asks for cpus: under TCG
// one (see the package's doc).
func EffectiveCPUs(accel string, cpus int) int {
	if accel == TCG {
		return 1
	}
	return cpus
}

// Args builds QEMU's arguments, without the program's name. It is pure. The
// order of the devices is part of the contract: a saved device state loads only
// into the same list. The machine starts paused, so that its console can be
// connected before the first byte; it costs one round trip (about 1 ms).
//
// The disk is opened with QEMU's default cache mode on purpose: a flush by the
// guest is an fdatasync on the host, so what the guest has synced survives a
// crash of either, and between flushes the host's page cache serves all
// machines on one image. Direct I/O would give up that sharing and gains
// nothing where durability is concerned; ignoring flushes would lose data.
// Threads do the I/O: io_uring is not allowed by the sandbox and native AIO
// needs direct I/O. A write that finds the host's disk full stops the machine
// rather than failing in the guest ([Owner] resumes it when there is room).
func Args(spec domain.MachineSpec, l Launch) ([]string, error) {
	if err := check(spec, l); err != nil {
		return nil, err
	}
	cmdline, err := kernelCommandLine(spec, l)
	if err != nil {
		return nil, err
	}
	netdev, err := netdevArg(spec.Slot, l.TAP)
	if err != nil {
		return nil, err
	}
	mem := strconv.FormatInt(spec.MemoryMiB, 10) + "M"
	a := []string{
		"-name", markArg(l.RunDir),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S",
		"-msg", "timestamp=on",
		"-sandbox", sandbox,
		"-M", "microvm,x-option-roms=off,isa-serial=on,acpi=" + onOff(spec.Boot.Kernel.NeedsACPI) +
			",rtc=on,pit=on,pic=on,memory-backend=mem0,suppress-vmdesc=on,dump-guest-core=off,mem-merge=off",
		"-global", "migration.send-configuration=off",
		"-object", "memory-backend-ram,id=mem0,size=" + mem,
	}
	if l.Accel == TCG {
		a = append(a, "-accel", fmt.Sprintf("tcg,thread=single,tb-size=%d", l.TBSizeMiB), "-cpu", "max")
	} else {
		a = append(a, "-accel", "kvm", "-cpu", "host")
	}
	a = append(a,
		"-smp", strconv.Itoa(EffectiveCPUs(l.Accel, spec.CPUs)),
		"-m", mem,
		"-kernel", spec.Boot.Kernel.Path,
	)
	if spec.Boot.Initrd != "" {
		a = append(a, "-initrd", spec.Boot.Initrd)
	}
	a = append(a,
		"-append", cmdline,
		"-chardev", socketArg("qmp", l.QMP), "-mon", "chardev=qmp,mode=control",
		"-chardev", socketArg("console", l.Console), "-serial", "chardev:console",
		"-chardev", socketArg("agent", l.Agent),
		// Two ports, the first of which is reserved for a console: each costs
		// the guest two queues.
		"-device", "virtio-serial-device,id=serial0,max_ports=2",
		"-device", "virtserialport,id=agent0,nr=1,chardev=agent,name="+AgentPort,
	)
	if l.Scratch {
		a = append(a, "-drive", "if=none,id=disk0,snapshot=on,file.driver=file,file.filename="+escape(spec.Disk.Path)+
			",format="+string(spec.Disk.Format))
	} else {
		a = append(a, "-blockdev", "driver="+string(spec.Disk.Format)+",node-name=disk0,discard=unmap,detect-zeroes=unmap"+
			",file.driver=file,file.node-name=file0,file.filename="+escape(spec.Disk.Path)+
			",file.aio=threads,file.discard=unmap,file.locking=auto")
	}
	a = append(a,
		"-device", "virtio-blk-device,id=blk0,drive=disk0,werror=enospc,rerror=report",
		"-netdev", netdev,
		"-device", "virtio-net-device,id=nic0,netdev=net0,mac="+spec.Slot.MAC,
	)
	if spec.Link == domain.LinkVsock {
		a = append(a, "-device", fmt.Sprintf("vhost-vsock-device,id=vsock0,guest-cid=%d,vhostfd=%d", spec.CID, l.Vsock))
	}
	return a, nil
}

func check(spec domain.MachineSpec, l Launch) error {
	switch {
	case !idPattern.MatchString(spec.ID):
		return fmt.Errorf("machine id %q is not %s", spec.ID, idPattern)
	case !filepath.IsAbs(l.RunDir):
		return fmt.Errorf("run directory %q is not absolute", l.RunDir)
	case l.Accel != KVM && l.Accel != TCG:
		return fmt.Errorf("unknown accelerator %q", l.Accel)
	case spec.CPUs < 1:
		return fmt.Errorf("%d vCPUs", spec.CPUs)
	case spec.MemoryMiB < 1:
		return fmt.Errorf("%d MiB of memory", spec.MemoryMiB)
	case spec.Init != "fast" && spec.Init != "image":
		return fmt.Errorf("unknown init mode %q", spec.Init)
	case spec.Link != domain.LinkSerial && spec.Link != domain.LinkVsock:
		return fmt.Errorf("unknown link %q", spec.Link)
	case spec.Link == domain.LinkVsock && spec.CID < 3: // 0 to 2 are reserved
		return fmt.Errorf("vsock CID %d", spec.CID)
	case spec.Disk.Format != domain.Raw && spec.Disk.Format != domain.QCOW2:
		return fmt.Errorf("unknown disk format %q", spec.Disk.Format)
	}
	for _, p := range []string{spec.Boot.Kernel.Path, spec.Disk.Path} {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("path %q is not absolute", p)
		}
	}
	if p := spec.Boot.Initrd; p != "" && !filepath.IsAbs(p) {
		return fmt.Errorf("path %q is not absolute", p)
	}
	if mac, err := net.ParseMAC(spec.Slot.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 {
		return fmt.Errorf("MAC %q is not that of one Ethernet interface", spec.Slot.MAC)
	}
	return nil
}

// kernelCommandLine tells the kernel where to print and what to do at its end
// (reset, which -no-reboot makes the end of QEMU: without ACPI there is no
// other way to switch off), and the agent what it must know before it has a
// link. Boot.Append comes last and so wins.
func kernelCommandLine(spec domain.MachineSpec, l Launch) (string, error) {
	words := []string{
		"console=ttyS0",
		"loglevel=4", // warnings and worse: printing the rest costs 50 ms of an 0.8 s boot
		"panic=-1", "reboot=t",
	}
	if l.Accel == TCG {
		// Calibrating against the emulated timers fails under load: the check
		// panics, the TSC's hangs the boot.
		words = append(words, "no_timer_check")
		if l.TSCkHz > 0 {
			words = append(words, "tsc_early_khz="+strconv.FormatInt(l.TSCkHz, 10))
		}
	}
	words = append(words, "agentiso.init="+spec.Init, "agentiso.link="+string(spec.Link))
	if spec.Boot.Append != "" {
		words = append(words, spec.Boot.Append)
	}
	line := strings.Join(words, " ")
	if len(line) > maxCommandLine {
		return "", fmt.Errorf("kernel command line has %d bytes: at most %d", len(line), maxCommandLine)
	}
	if strings.ContainsAny(line, "\x00\n") {
		return "", fmt.Errorf("kernel command line %q has a line break or NUL", line)
	}
	return line, nil
}

// netdevArg is the host's side of the NIC. User networking has no forwards
// into the guest, no TFTP and no IPv6; with restrict=on nothing passes at all.
// With restrict=off the guest reaches what the daemon's host reaches,
// services on the host's loopback included (at the gateway's address): QEMU
// has no switch for that. A TAP comes as a descriptor, so that QEMU's user
// needs neither /dev/net/tun nor rights to the interface.
func netdevArg(s domain.NetworkSlot, tap int) (string, error) {
	switch s.Driver {
	case "bridge":
		return fmt.Sprintf("tap,id=net0,fd=%d,vhost=off", tap), nil
	case "user":
	default:
		return "", fmt.Errorf("unknown network driver %q", s.Driver)
	}
	arg := "user,id=net0,ipv6=off,restrict=" + onOff(s.Restrict)
	if !s.Address.IsValid() {
		return arg, nil
	}
	if !s.Address.Addr().Is4() {
		return "", fmt.Errorf("user network %s is not IPv4", s.Address)
	}
	arg += ",net=" + s.Address.Masked().String()
	if s.Gateway.IsValid() {
		arg += ",host=" + s.Gateway.String()
	}
	for _, d := range s.DNS {
		// QEMU's own resolver must be inside the network; others the guest
		// reaches through the gateway.
		if s.Address.Contains(d) && d != s.Gateway {
			arg += ",dns=" + d.String()
			break
		}
	}
	return arg + ",dhcpstart=" + s.Address.Addr().String(), nil
}

func socketArg(id string, fd int) string {
	return fmt.Sprintf("socket,id=%s,fd=%d,server=on,wait=off", id, fd)
}

// markArg is the value of -name by which a process is found again.
func markArg(runDir string) string { return "guest=" + escape(runDir) }

// escape doubles commas, which otherwise end a value in QEMU's option syntax.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}
