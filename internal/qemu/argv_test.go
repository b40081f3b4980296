package qemu

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/internal/domain"
)

var update = flag.Bool("update", false, "rewrite golden files")

func plainSpec() domain.MachineSpec {
	return domain.MachineSpec{
		ID: "abc12345",
		Boot: domain.Boot{
			Kernel: domain.Kernel{Path: "/k/vmlinux", PVH: true},
			Initrd: "/k/initrd",
		},
		Init:      "fast",
		CPUs:      2,
		MemoryMiB: 512,
		Disk:      domain.Disk{Path: "/d/abc12345.qcow2", Format: domain.QCOW2, SizeBytes: 1 << 30},
		Slot:      domain.NetworkSlot{Driver: "user", MAC: "52:54:00:12:34:56", Restrict: true},
		Link:      domain.LinkSerial,
	}
}

func plainLaunch() Launch {
	return Launch{RunDir: "/run/agentiso/m/abc12345", Accel: TCG, TBSizeMiB: 64, TSCkHz: 2596144, QMP: 3, Console: 4, Agent: 5}
}

func TestArgs(t *testing.T) {
	tests := []struct {
		name string
		edit func(*domain.MachineSpec, *Launch)
	}{
		{"tcg", func(*domain.MachineSpec, *Launch) {}},
		{"kvm-acpi-append", func(s *domain.MachineSpec, l *Launch) {
			l.Accel = KVM
			s.Init = "image"
			s.Boot.Kernel.NeedsACPI = true
			s.Boot.Append = "loglevel=7 mitigations=off"
		}},
		{"vsock", func(s *domain.MachineSpec, l *Launch) { s.Link, s.CID, l.Vsock = domain.LinkVsock, 100, 6 }},
		{"bridge", func(s *domain.MachineSpec, l *Launch) { s.Slot.Driver, s.Slot.TAP, l.TAP = "bridge", "iso-abc", 6 }},
		{"user-internet", func(s *domain.MachineSpec, l *Launch) {
			s.Slot.Restrict = false
			s.Slot.Address = netip.MustParsePrefix("10.0.2.15/24")
			s.Slot.Gateway = netip.MustParseAddr("10.0.2.2")
			s.Slot.DNS = []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("10.0.2.3")}
		}},
		{"commas", func(s *domain.MachineSpec, l *Launch) {
			l.RunDir = "/run/a,b/m/abc12345"
			s.Boot.Kernel.Path, s.Boot.Initrd = "/k,k/vmlinux", "/k,k/initrd"
			s.Disk.Path = "/d,d/x=y.raw"
			s.Disk.Format = domain.Raw
		}},
		{"scratch", func(s *domain.MachineSpec, l *Launch) { l.Scratch, l.TSCkHz, s.Boot.Initrd = true, 0, "" }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, l := plainSpec(), plainLaunch()
			tt.edit(&s, &l)
			args, err := Args(s, l)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(args, "\n") + "\n"
			golden := filepath.Join("testdata", "argv", tt.name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("arguments (-want +got):\n%s", diff)
			}
		})
	}
}

// TestDeviceOrder: whatever the options, devices keep their places.
func TestDeviceOrder(t *testing.T) {
	order := []string{"virtio-serial-device", "virtserialport", "virtio-blk-device", "virtio-net-device", "vhost-vsock-device"}
	for _, link := range []domain.LinkKind{domain.LinkSerial, domain.LinkVsock} {
		s, l := plainSpec(), plainLaunch()
		s.Link, s.CID = link, 100
		args, err := Args(s, l)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for i, a := range args {
			if a == "-device" {
				name, _, _ := strings.Cut(args[i+1], ",")
				got = append(got, name)
			}
		}
		want := order
		if link == domain.LinkSerial {
			want = order[:4]
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", link, diff)
		}
	}
}

func TestArgsRefuses(t *testing.T) {
	tests := []struct {
		name string
		edit func(*domain.MachineSpec, *Launch)
		want string
	}{
		{"id", func(s *domain.MachineSpec, _ *Launch) { s.ID = "../x" }, "machine id"},
		{"run dir", func(_ *domain.MachineSpec, l *Launch) { l.RunDir = "m/x" }, "not absolute"},
		{"accel", func(_ *domain.MachineSpec, l *Launch) { l.Accel = "hax" }, "accelerator"},
		{"cpus", func(s *domain.MachineSpec, _ *Launch) { s.CPUs = 0 }, "vCPUs"},
		{"memory", func(s *domain.MachineSpec, _ *Launch) { s.MemoryMiB = 0 }, "memory"},
		{"init", func(s *domain.MachineSpec, _ *Launch) { s.Init = "fast x=y" }, "init mode"},
		{"link", func(s *domain.MachineSpec, _ *Launch) { s.Link = "" }, "link"},
		{"cid", func(s *domain.MachineSpec, _ *Launch) { s.Link = domain.LinkVsock }, "CID"},
		{"format", func(s *domain.MachineSpec, _ *Launch) { s.Disk.Format = "vmdk" }, "format"},
		{"no disk", func(s *domain.MachineSpec, _ *Launch) { s.Disk.Path = "" }, "not absolute"},
		{"mac", func(s *domain.MachineSpec, _ *Launch) { s.Slot.MAC = "52:54:00:12:34:56,romfile=x" }, "MAC"},
		{"multicast", func(s *domain.MachineSpec, _ *Launch) { s.Slot.MAC = "01:54:00:12:34:56" }, "MAC"},
		{"driver", func(s *domain.MachineSpec, _ *Launch) { s.Slot.Driver = "passt" }, "network driver"},
		{"ipv6", func(s *domain.MachineSpec, _ *Launch) { s.Slot.Address = netip.MustParsePrefix("fd00::2/64") }, "not IPv4"},
		{"long", func(s *domain.MachineSpec, _ *Launch) { s.Boot.Append = strings.Repeat("x", 1800) }, "at most"},
		{"line", func(s *domain.MachineSpec, _ *Launch) { s.Boot.Append = "a\nb" }, "line break"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, l := plainSpec(), plainLaunch()
			tt.edit(&s, &l)
			if _, err := Args(s, l); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
